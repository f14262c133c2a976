"""The transformer and its parts, written for a single device."""
