"""Data that is kept at an address, such as S3-compatible storage, and read through a local cache.

Objects at an address are named by their content and never change, except for the manifests, which
are written last. What a manifest names exists, and nothing that a job reads is replaced.
"""
