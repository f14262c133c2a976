"""Process group, sharding, checkpoints, optimizer and schedule."""
