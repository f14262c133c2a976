"""A model for many clients at once: the engine, the HTTP endpoint."""
