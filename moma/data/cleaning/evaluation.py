"""Finds texts of evaluation files in documents, by n-grams of words."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from pydantic import Field

from moma.data.cleaning.ngrams import ngrams
from moma.data.documents import Document, SourceConfig
from moma.data.sources.captions import CaptionsConfig
from moma.data.sources.interleaved import InterleavedConfig
from moma.data.sources.jsonl import Line, read_jsonl, require_text
from moma.data.sources.paths import FileRange, expand_pattern
from moma.data.sources.registry import AnySource
from moma.errors import UserError
from moma.recipe import Config, read_recipe


class SourceList(Config):
    """A TOML file of sources to evaluate on.

    Attributes:
        sources: as in `[data]` of a recipe.
    """

    sources: tuple[AnySource, ...] = Field(min_length=1)


def evaluation_sources(path: Path) -> tuple[SourceConfig, ...]:
    """Return the sources that a path stands for.

    Args:
        path: a TOML file of sources, a folder of captioned images, or a file of interleaved
            documents in JSON Lines.
    """
    if path.suffix == ".toml":
        return read_recipe(SourceList, path).sources
    if path.is_dir():
        return (CaptionsConfig(path=path),)
    return (InterleavedConfig(path=path),)


def evaluation_fingerprint(path: Path) -> str:
    """Return what changes with the files that are evaluated on."""
    sources = evaluation_sources(path)
    return " ".join(source.model_dump_json() + source.fingerprint() for source in sources)


def evaluation_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield location and text of every document, or every question with its right answer.

    Raises:
        UserError: the file cannot be read, or a row is malformed.
    """
    if not path.is_dir() and path.suffix != ".toml":
        lines = read_jsonl(map(FileRange, expand_pattern(path)))
        first = next(lines, None)
        if first is not None and "question" in _values(first):
            yield first.location, _question(first)
            yield from ((line.location, _question(line)) for line in lines)
            return
    for source in evaluation_sources(path):
        for row in source.documents():
            if not isinstance(row, Document):
                raise UserError(row.message)
            yield row.row, text_of(row)


def text_of(document: Document) -> str:
    """Return the texts of a document as one."""
    return "\n".join(part for part in document.segments if isinstance(part, str))


class EvaluationTexts:
    """The n-grams of evaluation texts, about 24 bytes each."""

    def __init__(self, paths: tuple[Path, ...], words: int, overlap: float) -> None:
        """Read the files; see `CleaningConfig` for the arguments."""
        self._words, self._overlap = words, overlap
        self._locations: list[str] = []
        hashes, counts = [np.empty(0, np.uint64)], []
        for path in paths:
            for location, text in evaluation_texts(path):
                found = self._hashes(text)
                self._locations.append(location)
                hashes.append(found)
                counts.append(len(found))
        flat = np.concatenate(hashes)
        order = np.argsort(flat, kind="stable")
        self._sorted, self._counts = flat[order], np.array(counts, np.int64)
        self._text = np.repeat(np.arange(len(counts)), self._counts)[order]

    def find(self, text: str) -> str | None:
        """Return the location of the first evaluation text that a text contains."""
        found = self._hashes(text)
        begins = np.searchsorted(self._sorted, found, "left")
        ends = np.searchsorted(self._sorted, found, "right")
        is_hit = begins < ends
        if not is_hit.any():
            return None
        spans = zip(begins[is_hit].tolist(), ends[is_hit].tolist(), strict=True)
        texts, hits = np.unique(
            np.concatenate([self._text[begin:end] for begin, end in spans]), return_counts=True
        )
        contained = texts[hits >= self._overlap * self._counts[texts]]
        return self._locations[contained[0]] if len(contained) else None

    def _hashes(self, text: str) -> np.ndarray:
        """Return the hashes of the distinct n-grams of a text, uint64 of shape [n-grams]."""
        distinct = {*ngrams(text, self._words)}
        values = (xxhash.xxh3_64_intdigest(ngram.encode()) for ngram in distinct)
        return np.fromiter(values, np.uint64, len(distinct))


def _values(line: Line) -> dict[str, object]:
    try:
        return line.values()
    except UserError as error:
        raise UserError(f"{line.location}: {error}") from error


def _question(line: Line) -> str:
    try:
        values = line.values()
        answer, choices = values.get("answer"), values.get("choices")
        if isinstance(choices, list) and isinstance(answer, float):
            answer = choices[int(answer)] if answer in range(len(choices)) else None
        return f"{require_text(values, 'question')}\n{answer if isinstance(answer, str) else ''}"
    except UserError as error:
        raise UserError(f"{line.location}: {error}") from error
