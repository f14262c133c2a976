"""Readers of documents, a module for each kind of source.

Each is a `SourceConfig`, a section of a recipe: it yields rows with their location and a
function that makes a row's document, and `reading.ReaderConfig` rejects those that fail.
"""
