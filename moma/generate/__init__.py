"""Writing text and pictures with a trained model, one token at a time."""
