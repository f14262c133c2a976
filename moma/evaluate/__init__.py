"""Losses, perplexities and image scores of a trained model."""
