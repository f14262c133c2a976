"""Text and picture tokenizers and their training."""
