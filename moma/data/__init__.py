"""Documents, encoding, packing, mixing and batches: told its rank, never asking for it."""
