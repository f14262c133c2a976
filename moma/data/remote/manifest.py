"""What is complete at an address: a manifest of the tokenizers, and one of each source.

    tokenizers.json       names the objects tokenizers/… of tokenizer, vocabulary and codec
    sources/captions.json names the objects shards/captions/FINGERPRINT/…

A name contains the first digits of the checksum of the content.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from moma.files import Checksum
from moma.recipe import Config

TOKENIZERS_MANIFEST = "tokenizers.json"
_DIGEST = re.compile("[0-9a-f]{64}")
_DIGITS_IN_NAMES = 16


def check_name(name: str) -> str:
    """Return a name below a folder; raises `ValueError` if it leads elsewhere."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{name[:100]!r} is no relative name: it is absolute, or has '..', an empty part, a "
            "backslash or a character that cannot be printed"
        )
    return name


def check_checksum(checksum: Checksum) -> Checksum:
    """Return size and SHA-256; raises `ValueError` if they are none."""
    if checksum[0] < 0 or not _DIGEST.fullmatch(checksum[1]):
        raise ValueError("should be a size and a SHA-256 of 64 hexadecimal digits")
    return checksum


Name = Annotated[str, AfterValidator(check_name)]
CheckedChecksum = Annotated[Checksum, AfterValidator(check_checksum)]


class Manifest(Config):
    """What is complete at an address.

    Attributes:
        kind, format: identify the file.
        folder: folder of the objects.
        files: size and SHA-256 of each small file, by its name in the local folder.
        documents: number of documents, for people.
    """

    kind: Literal["moma remote data"] = "moma remote data"
    format: Literal[1] = 1
    folder: Name
    files: dict[Name, CheckedChecksum] = Field(default={})
    documents: int = 0

    def object_of(self, file: str) -> str:
        """Return the name of the object of a file."""
        return object_name(self.folder, file, self.files[file])


def source_manifest(source: str) -> str:
    """Return the name of the manifest of a source."""
    return f"sources/{source}.json"


def object_name(folder: str, file: str, checksum: Checksum) -> str:
    """Return the name of the object of a file: `train-00012-00003-0123456789abcdef.arrow`."""
    path = PurePosixPath(folder) / file
    return str(path.with_name(f"{path.stem}-{checksum[1][:_DIGITS_IN_NAMES]}{path.suffix}"))


def index_name(arrow: str) -> str:
    """Return the name of the file with the lengths and images of an Arrow file's documents."""
    return str(Path(arrow).with_suffix(".npy"))
