"""Text and image tokenizers, and their training."""
