"""Writing text and images with a trained model, one token at a time."""
