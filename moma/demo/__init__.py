"""The demo: its drawings, documents, scoring and run."""
