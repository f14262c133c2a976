"""Documents → encoded shards."""
