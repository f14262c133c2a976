"""The transformer and its parts, written for one device."""
