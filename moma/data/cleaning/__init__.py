"""Which documents and images of a source are dropped before they are encoded.

Filters look at one document, where it is read; duplicates are found among the documents of all
sources, in a pass before (`signatures`, `duplicates`).
"""
