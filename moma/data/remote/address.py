"""Addresses of storage in a recipe."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
# Schemes of fsspec that read only, need another address or options, or end with the process.
_NO_STORAGE = (
    *("memory", "asyncwrapper", "async_wrapper", "dvc"),
    *("http", "https", "git", "github", "gist", "tar", "libarchive", "zip", "data", "reference"),
    *("dir", "generic", "cached", "blockcache", "filecache", "simplecache"),
)


def check_address(address: str) -> str:
    """Return an address such as `s3://bucket/folder`, without a slash at its end.

    Raises:
        ValueError: it is none, or contains credentials; the message does not repeat it.
    """
    found = _SCHEME.fullmatch(address)
    if found is None or "::" in address:
        raise ValueError("should be an address such as s3://bucket/folder or file:///folder")
    if found[1] == "local":
        raise ValueError("should begin with file:///, such as file:///folder")
    if found[1] in _NO_STORAGE:
        raise ValueError(
            f"{found[1]}:// is no storage that keeps what is written, for other processes to read; "
            "use s3://bucket/folder, file:///folder, or another file system of fsspec"
        )
    authority = found[2].partition("/")[0]
    if "@" in authority or re.search(r"[?#]", address):
        raise ValueError(
            "contains credentials or parameters, which would be stored with every run; give them "
            "in the environment or in the storage library's own configuration"
        )
    if not found[2].strip("/") or any(part in (".", "..") for part in found[2].split("/")):
        raise ValueError("should name a folder, such as s3://bucket/folder, without . or ..")
    if not address.isprintable() or re.search(r"[\\*\[\]]", address):
        raise ValueError("has one of \\ * [ ], or a character that cannot be printed")
    if found[1] == "file" and authority:
        raise ValueError("should be an absolute path, such as file:///folder")
    return address.rstrip("/")


Address: Any = Annotated[str, AfterValidator(check_address)]
"""An address as `check_address` accepts it."""
