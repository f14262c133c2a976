"""Suites of measures: each turns documents into sequences to score, and their scores into sums."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moma.data.config import DataConfig
from moma.errors import UserError
from moma.evaluate.documents import TokenizedDocument, tokenized_documents
from moma.evaluate.score import Score, ScoredSequence, windows, with_target
from moma.evaluate.summary import Formula, Record, exponential, identity
from moma.generate.mixed import MixedModel
from moma.tokenizers.text import decode_bytes
from moma.vocabulary import IMAGE, TEXT, Vocabulary

logger = logging.getLogger(__name__)

CANDIDATES = 16


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what.

    Attributes:
        score: scores sequences with the model.
        data: the prepared data of the run.
        path: the suite's file or folder; None for the documents that the run holds out.
        weights: file, folder or name of the weights that a suite's measure needs besides.
        warns: whether to log warnings: on one rank of many.
    """

    mixed: MixedModel
    score: Score
    data: DataConfig
    path: Path | None = None
    weights: str | None = None
    warns: bool = True

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of the model."""
        return self.mixed.model.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.mixed.model.embedding.weight.device


class Suite(NamedTuple):
    """A suite whose documents are found.

    Attributes:
        units: what is resampled in the bootstrap: a document, an image with its captions, or a
            question.
        measure: returns the record of each of some units.
        totals: returns further measures, of all documents of all ranks, which call it together.
    """

    units: Sequence[Any]
    measure: Callable[[Any], list[Record]]
    formulas: Mapping[str, Formula]
    totals: Callable[[], dict[str, Any]] = dict


def perplexity(subject: Subject) -> Suite:
    """Perplexity of interleaved documents, and how well images and text are predicted."""
    vocabulary, tokenizer = subject.vocabulary, subject.mixed.tokenizer

    def measure(documents: Sequence[TokenizedDocument]) -> list[Record]:
        ids_of = [document.ids().astype(np.int64) for document in documents]
        parts = [windows(ids, subject.mixed.context, vocabulary) for ids in ids_of]
        scores = iter(subject.score([window for own in parts for window in own]))
        records = []
        for document, ids, own in zip(documents, ids_of, parts, strict=True):
            log_likelihoods, are_top = zip(*(next(scores) for _ in own), strict=True)
            nats, is_top, targets = (
                -np.concatenate(log_likelihoods),
                np.concatenate(are_top),
                ids[1:],
            )
            is_image = vocabulary.modality_of_id[targets] == IMAGE
            is_text = vocabulary.modality_of_id[targets] == TEXT
            is_plain = is_text & ~np.isin(targets, vocabulary.special)
            text = decode_bytes(tokenizer, targets[is_plain].tolist())
            sums = {
                "perplexity": (nats.sum(), len(nats)),
                "perplexity_text": (nats[is_text].sum(), is_text.sum()),
                "perplexity_image": (nats[is_image].sum(), is_image.sum()),
                "bits_per_byte": (nats[is_plain].sum() / math.log(2), len(text)),
                "code_accuracy": (is_top[is_image].sum(), is_image.sum()),
            }
            records.append(Record(document.source, sums))
        return records

    formulas = {
        "perplexity": exponential,
        "perplexity_text": exponential,
        "perplexity_image": exponential,
        "bits_per_byte": identity,
        "code_accuracy": identity,
    }
    documents = tokenized_documents(subject.mixed, subject.data, subject.path)
    return Suite(documents, measure, formulas)


class CaptionedImage(NamedTuple):
    """An image and one of its captions.

    Attributes:
        image: ids, with those around the image.
        caption: ids.
    """

    image: list[int]
    caption: list[int]

    def image_to_text(self, caption: list[int], vocabulary: Vocabulary) -> ScoredSequence:
        """A caption, and the end of the document, given this image."""
        return with_target([vocabulary.beginning, *self.image], [*caption, vocabulary.end])

    def text_to_image(self, image: list[int], vocabulary: Vocabulary) -> ScoredSequence:
        """The codes of an image given this caption."""
        return with_target([vocabulary.beginning, *self.caption, image[0]], image[1:-1])


def captions(subject: Subject) -> Suite:
    """Perplexity of captions given their image, and of images given a caption."""
    vocabulary = subject.vocabulary

    def measure(images: Sequence[list[TokenizedDocument]]) -> list[Record]:
        pairs_of = [[_split(each.ids(), vocabulary) for each in image] for image in images]
        sequences = [
            sequence
            for pairs in pairs_of
            for pair in pairs
            for sequence in (
                pair.image_to_text(pair.caption, vocabulary),
                pair.text_to_image(pair.image, vocabulary),
            )
        ]
        scores = iter(subject.score(sequences))
        records = []
        for image, pairs in zip(images, pairs_of, strict=True):
            own = [-next(scores).log_likelihood_T for _ in pairs for _ in range(2)]
            sums = {
                "image_to_text_perplexity": _sum(own[::2]),
                "text_to_image_perplexity": _sum(own[1::2]),
            }
            records.append(Record(image[0].source, sums))
        return records

    formulas = {"image_to_text_perplexity": exponential, "text_to_image_perplexity": exponential}
    return Suite(_by_image(subject), measure, formulas)


class Query(NamedTuple):
    """A captioned image among its candidates: the position of one in a list of them."""

    position: int
    candidates: list[TokenizedDocument]


def retrieval(subject: Subject) -> Suite:
    """Accuracy of finding one of 16 captions by its image, and one of 16 images by its caption.

    The candidate of the highest log-likelihood is chosen; `normalized`: of the highest difference
    to its log-likelihood without the image, or without the caption.
    """
    vocabulary = subject.vocabulary

    def measure(queries: Sequence[Query]) -> list[Record]:
        # Queries share candidates, whose images may have to be encoded.
        candidates = {id(each): each for query in queries for each in query.candidates}
        split = {key: _split(each.ids(), vocabulary) for key, each in candidates.items()}
        sequences = [
            sequence
            for query in queries
            for sequence in _retrieval_sequences(
                query.position, [split[id(each)] for each in query.candidates], vocabulary
            )
        ]
        found = [each.log_likelihood_T.sum() for each in subject.score(sequences)]
        records = []
        for query, scores in zip(queries, np.reshape(found, (-1, 4, CANDIDATES)), strict=True):
            texts, prior_texts, images, prior_images = scores
            sums = {
                "image_to_text": texts,
                "image_to_text_normalized": texts - prior_texts,
                "text_to_image": images,
                "text_to_image_normalized": images - prior_images,
            }
            source = query.candidates[query.position].source
            credits = {name: (credit(each, query.position), 1) for name, each in sums.items()}
            records.append(Record(source, credits))
        return records

    names = [
        f"{direction}{suffix}"
        for direction in ("image_to_text", "text_to_image")
        for suffix in ("", "_normalized")
    ]
    queries = _queries([image[0] for image in _by_image(subject)])
    return Suite(queries, measure, dict.fromkeys(names, identity))


def _queries(pairs: Sequence[TokenizedDocument]) -> list[Query]:
    """A query for each captioned image; raises `UserError` if they are too few for one group."""
    if len(pairs) < CANDIDATES:
        raise UserError(
            f"retrieval: there are {len(pairs)} captioned images, and {CANDIDATES} are needed; "
            "name more with --from"
        )
    queries = []
    for number in range(len(pairs)):
        # The last group overlaps the one before it, so that every query has as many candidates.
        first = min(number - number % CANDIDATES, len(pairs) - CANDIDATES)
        queries.append(Query(number - first, list(pairs[first : first + CANDIDATES])))
    return queries


def credit(scores: np.ndarray, right: int) -> float:
    """The expected accuracy of choosing the highest score, with a draw among equal ones."""
    best = scores == scores.max()
    return float(best[right] / best.sum())


def _retrieval_sequences(
    position: int, pairs: Sequence[CaptionedImage], vocabulary: Vocabulary
) -> Iterator[ScoredSequence]:
    """Captions given the image, captions, images given the caption, images: of all candidates."""
    own, nothing = pairs[position], CaptionedImage([], [])
    for given in (own, nothing):
        yield from (given.image_to_text(pair.caption, vocabulary) for pair in pairs)
    for given in (own, nothing):
        yield from (given.text_to_image(pair.image, vocabulary) for pair in pairs)


def _by_image(subject: Subject) -> list[list[TokenizedDocument]]:
    """The captioned images, those with the same image together: their names are equal."""
    documents = tokenized_documents(subject.mixed, subject.data, subject.path)
    pairs = [
        document
        for document in documents
        if document.is_captioned_image and document.tokens <= subject.mixed.context + 1
    ]
    longer = f", or are longer than the context of {subject.mixed.context} tokens"
    report_left_out(subject, len(documents) - len(pairs), len(documents), longer)
    images: dict[tuple[str, str], list[TokenizedDocument]] = {}
    for pair in pairs:
        images.setdefault((pair.source, pair.name), []).append(pair)
    return list(images.values())


def report_left_out(subject: Subject, left_out: int, documents: int, reason: str) -> None:
    """Warn about documents without an image and its caption; raise `UserError` if all are such."""
    what = f"not one image with one text{reason}"
    if left_out == documents:
        raise UserError(f"all {documents} documents are {what}; name captioned images with --from")
    if left_out and subject.warns:
        logger.warning("left out %d of %d documents, which are %s", left_out, documents, what)


def _split(ids: np.ndarray, vocabulary: Vocabulary) -> CaptionedImage:
    """Separate image and caption of a document."""
    inside = ids[1:-1].astype(np.int64).tolist()
    span = vocabulary.image_span
    if inside[0] == vocabulary.begin_image:
        return CaptionedImage(inside[:span], inside[span:])
    return CaptionedImage(inside[-span:], inside[:-span])


def _sum(parts: Sequence[np.ndarray]) -> tuple[float, int]:
    return sum(float(part.sum()) for part in parts), sum(map(len, parts))
