"""Documents to evaluate a model on: those a run holds out, or those of any sources.

prepared data: held-out shards ──────────────────────────────┐
a file of sources, a folder of captions, JSON Lines ─ encoded ┴→ `TokenizedDocument`
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moma.data.cleaning.clean import Cleaning
from moma.data.cleaning.evaluation import evaluation_sources
from moma.data.cleaning.passes import provide_cleaning
from moma.data.config import DataConfig
from moma.data.documents import (
    Document,
    Rejected,
    SourceConfig,
    held_out_share,
    which_held_out,
)
from moma.data.outputs import CLEANING_FOLDER
from moma.data.remote.fetching import provide_data
from moma.data.shards import open_sources
from moma.errors import UserError
from moma.generate.mixed import MixedModel
from moma.tokenizers.text import encode_text
from moma.vocabulary import Vocabulary


class TokenizedDocument(NamedTuple):
    """A document whose ids are read or computed when they are needed.

    Attributes:
        is_captioned_image: whether it is one image with one text, in either order.
        ids: returns them, integers of shape [tokens].
    """

    source: str
    name: str
    tokens: int
    is_captioned_image: bool
    ids: Callable[[], np.ndarray]


def tokenized_documents(
    mixed: MixedModel, data: DataConfig, path: Path | None
) -> list[TokenizedDocument]:
    """The held-out documents of prepared data, or those that a path names.

    Raises:
        UserError: there are none, or one of a path cannot be used.
    """
    vocabulary = mixed.model.vocabulary
    if path is None:
        found = list(_held_out(data, vocabulary))
    else:
        found = [_tokenize(mixed, source, each) for source, each in raw_documents(data, path)]
    if not found:
        raise UserError(
            f"{path or data.path}: no {'' if path else 'held-out '}documents to evaluate on"
            + ("" if path else "; increase data.held_out and train a new run, or use --from")
        )
    return found


def raw_documents(data: DataConfig, path: Path | None) -> list[tuple[str, Document]]:
    """Source and document of what is held out of training, or of what a path names.

    Args:
        data: names the sources of training.
        path: a TOML file of sources, a folder of captioned images, or a file of interleaved
            documents in JSON Lines.

    Raises:
        UserError: a source cannot be read, or a document of a path cannot be used.
    """
    found: list[tuple[str, Document]] = []
    cleaning: dict[str, Cleaning] = {}
    if path is None:
        folder = data.path / CLEANING_FOLDER
        cleaning = provide_cleaning(data.sources, folder, data.part_bytes)
    for source in data.sources if path is None else evaluation_sources(path):
        documents = []
        for row in _rows(source, cleaning.get(source.name), data.part_bytes):
            if isinstance(row, Document):
                documents.append(row)
            elif path is not None:  # `moma prepare` lists those of training
                raise UserError(row.message)
        if path is None:
            held_out = which_held_out(documents, held_out_share(source, data.held_out))
            documents = [each for each, is_held in zip(documents, held_out, strict=True) if is_held]
        found += [(source.name, document) for document in documents]
    return found


def _rows(
    source: SourceConfig, cleaning: Cleaning | None, part_bytes: int
) -> Iterator[Document | Rejected]:
    """The documents of a source, as `moma prepare` cleans them."""
    for number, part in enumerate(source.parts(part_bytes)):
        rows = source.read_part(part)
        yield from rows if cleaning is None else cleaning.rows(rows, number)


def _held_out(data: DataConfig, vocabulary: Vocabulary) -> Iterator[TokenizedDocument]:
    names = [source.name for source in data.sources]
    provide_data(data)
    for source, shards in open_sources(data.path, names, vocabulary).items():
        encoded = shards.splits["held_out"]
        for row, (tokens, images) in enumerate(zip(encoded.lengths, encoded.images, strict=True)):
            ids = partial(encoded.ids, row)
            is_pair = images == 1 and tokens > vocabulary.image_span + 2
            if is_pair:  # the image is at the beginning or at the end
                first, last = ids()[[1, -2]]
                is_pair = first == vocabulary.begin_image or last == vocabulary.end_image
            yield TokenizedDocument(source, encoded.name(row), int(tokens), bool(is_pair), ids)


def _tokenize(mixed: MixedModel, source: str, document: Document) -> TokenizedDocument:
    segments, vocabulary = document.segments, mixed.model.vocabulary
    texts = [part for part in segments if isinstance(part, str)]
    tokens = sum(len(encode_text(mixed.tokenizer, text)) for text in texts) + 2
    tokens += (len(segments) - len(texts)) * vocabulary.image_span

    def ids() -> np.ndarray:
        parts = [part if isinstance(part, str) else part.read() for part in segments]
        return np.array([*mixed.encode(parts), vocabulary.end])

    is_pair = len(segments) == 2 and len(texts) == 1
    return TokenizedDocument(source, document.name, tokens, is_pair, ids)
