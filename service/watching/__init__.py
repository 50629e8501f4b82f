"""Watching embeddings: the canary, sampled traffic, rows from other services, and windows stored over a restart."""
