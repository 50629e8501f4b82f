"""Past one machine: bulk embedding whose output can be resumed, shard by shard."""
