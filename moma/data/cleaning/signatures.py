"""Signatures of documents and images, by which duplicates are found; a file set for each part.

    FOLDER/part-00000/  documents.json           number of documents
                        texts.bin, images.bin    records: `TEXT` and `IMAGE`
                        minhash.bin              uint32 [texts, PERMUTATIONS], if texts are compared

24 bytes for a text, 512 more for its MinHash, and 37 bytes for an image.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from moma.data.cleaning.config import CleaningConfig
from moma.data.cleaning.evaluation import text_of
from moma.data.cleaning.filters import make_filter, missing_package
from moma.data.cleaning.ngrams import ngrams
from moma.data.documents import Document, DroppedImageError, ImageRef, Rejected, drops_document
from moma.errors import StorageError, UserError
from moma.files import atomic_replace, atomic_write, read_json

PERMUTATIONS = 128
_SEED = 1
# `document` counts from 0 in the part, rejected ones included.
TEXT = np.dtype([("document", "<i8"), ("hash", "<u8", (2,))])
# `number` counts the images of a document from 0; `single`: the document has one text or none.
IMAGE = np.dtype(
    [
        ("document", "<i8"),
        ("number", "<i4"),
        ("single", "?"),
        ("hash", "<u8", (2,)),
        ("perceptual", "<u8"),
    ]
)
_COUNT_FILE = "documents.json"


@dataclass(frozen=True)
class Signatures:
    """The signatures of one part, memory-mapped.

    Attributes:
        documents: number of documents of the part, rejected ones included.
        texts, images: records, [texts] and [images].
        minhash: uint32 [texts, PERMUTATIONS], or without rows.
    """

    documents: int
    texts: np.ndarray
    images: np.ndarray
    minhash: np.ndarray


def write_signatures(
    rows: Iterable[Document | Rejected],
    config: CleaningConfig,
    folder: Path,
    progress: Callable[[int], None] = lambda documents: None,
) -> int:
    """Write the signatures of a part's documents into a new folder, which appears at the end.

    Args:
        rows: the documents of the part, not filtered yet.
        config: of the source: which signatures are needed.
        progress: called with the number of documents so far, which is returned at the end.
    """
    atomic_replace(folder, partial(_write, rows, config, progress))
    count: int = read_json(folder / _COUNT_FILE)
    return count


def open_signatures(folder: Path) -> Signatures | None:
    """Open the signatures of a part; None if they are not complete."""
    if not folder.exists():
        return None
    texts, images = _open(folder / "texts.bin", TEXT), _open(folder / "images.bin", IMAGE)
    minhash = _open(folder / "minhash.bin", np.dtype("<u4")).reshape(-1, PERMUTATIONS)
    return Signatures(read_json(folder / _COUNT_FILE), texts, images, minhash)


def _open(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _write(
    rows: Iterable[Document | Rejected],
    config: CleaningConfig,
    progress: Callable[[int], None],
    folder: Path,
) -> None:
    folder.mkdir(parents=True)
    apply = make_filter(config)
    hash_text = _minhash(config.near_duplicate_ngram) if config.near_duplicate_texts else None
    number = 0
    with ExitStack() as stack:
        names = ("texts", "images", "minhash")
        texts, images, minhash = (
            stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names
        )
        for number, row in enumerate(rows, 1):
            document = apply(row) if isinstance(row, Document) else row
            if isinstance(document, Document):
                found = _image_records(document, number - 1, config)
                if found is not None:
                    images.write(found.tobytes())
                    text = " ".join(text_of(document).split()) if config.compares_texts else ""
                    if text:
                        record = np.array((number - 1, _hash(text.encode())), TEXT)
                        texts.write(record.tobytes())
                        if hash_text:
                            minhash.write(hash_text(text))
            progress(number)
    atomic_write(folder / _COUNT_FILE, json.dumps(number))


def _image_records(document: Document, number: int, config: CleaningConfig) -> np.ndarray | None:
    """Return the signatures of a document's images that are not dropped, [images].

    None if the document is rejected for its images.
    """
    references = [part for part in document.segments if isinstance(part, ImageRef)]
    single = len(document.segments) - len(references) <= 1
    records = []
    for position, reference in enumerate(references):
        try:
            image = reference.read()
        except DroppedImageError:
            continue
        except StorageError:
            raise
        except UserError:
            return None  # encoding rejects the document
        if config.compares_images:
            perceptual = _perceptual_hash(image) if config.near_duplicate_images is not None else 0
            pixels = f"{image.size}".encode() + image.convert("RGB").tobytes()
            records.append((number, position, single, _hash(pixels), perceptual))
        else:
            records.append((number, position, single, (0, 0), 0))
    if drops_document(single, len(references), len(references) - len(records)):
        return None
    return np.array(records if config.compares_images else [], IMAGE)


def _hash(data: bytes) -> tuple[int, int]:
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])


def _minhash(words: int) -> Callable[[str], bytes]:
    """Return a function that computes the MinHash of a text's n-grams."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise missing_package("near_duplicate_texts", error) from error

    def compute(text: str) -> bytes:
        found = ngrams(text, words) or [text]  # of a text without words, the text itself
        (sketch,) = RMinHash.from_token_sets([found], num_perm=PERMUTATIONS, seed=_SEED)
        return np.array(sketch.digest(), "<u4").tobytes()

    return compute


def _perceptual_hash(image: Image.Image) -> int:
    try:
        from imagehash import phash
    except ImportError as error:
        raise missing_package("near_duplicate_images", error) from error
    return int(str(phash(image)), 16)
