"""What is watched: canary, sampled traffic, rows from elsewhere, and windows kept over a restart."""
