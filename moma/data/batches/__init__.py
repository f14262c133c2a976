"""Encoded shards → exactly balanced micro-batches."""
