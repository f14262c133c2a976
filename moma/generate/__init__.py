"""Causal generation of text and images with a trained model."""
