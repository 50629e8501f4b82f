"""Bulk embedding of large sources, shard by shard. A run that was interrupted can be resumed."""
