"""Readers of documents, a module for each kind of source.

Each is a section of a recipe and a `Source` at once. Rows are read one by one and images only
when they are needed, so that the size of the data does not matter.
"""
