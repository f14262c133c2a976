"""The image codec: image ↔ codes."""
