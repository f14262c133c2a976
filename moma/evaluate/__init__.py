"""Losses, perplexities and picture scores of a trained model."""
