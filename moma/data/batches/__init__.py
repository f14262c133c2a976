"""EncodedDocument shards → exactly balanced micro-batches."""
