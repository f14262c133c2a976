"""The command line: `moma <verb>`."""

from moma.cli.root import app, main

__all__ = ["app", "main"]
