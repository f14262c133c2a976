"""What a data folder contains: counts, lengths, and documents decoded to text and images."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moma.data.outputs import write_output
from moma.data.shards import (
    SPLITS,
    Shards,
    open_sources,
    open_unfinished,
    require_data_folder,
)
from moma.errors import UserError, list_names
from moma.images import png_bytes
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, to_pil
from moma.tokenizers.text import load_text_tokenizer
from moma.vocabulary import Vocabulary

_BAR = 40  # characters
# Matplotlib draws no figure of more than 65,536 pixels.
_MAX_PANELS = 100


def inspect(folder: Path, source: str | None, out: Path) -> dict[str, Any]:
    """Count what the shards of a data folder contain, and plot the lengths of the documents.

    Args:
        source: only this source; None for all.
        out: folder for `lengths.png`.

    Returns:
        `path`, `figure`, and of all sources together as of each in `sources`: `documents`,
        `tokens`, `text_tokens`, `image_tokens` (codes; the boundaries of an image are text),
        `images`, `rejected`, `dropped` and `dropped_images` (by key of `clean`), `lengths`: a
        histogram, `from` has the shortest length of each bin and `documents` their number. Each
        source also has `splits`: the counts by split.

    Raises:
        UserError: the folder is not a data folder, or has no such source.
    """
    vocabulary = _vocabulary_of(folder)
    opened = _open(folder, source, vocabulary)
    sources = {name: _describe(shards, vocabulary) for name, shards in opened.items()}
    keys = ("documents", "tokens", "text_tokens", "image_tokens", "images", "rejected")
    figure = out / "lengths.png"
    _plot({name: counts["lengths"] for name, counts in sources.items()}, figure)
    return {
        "path": str(folder),
        **{key: sum(counts[key] for counts in sources.values()) for key in keys},
        **{
            key: _sum(counts[key] for counts in sources.values())
            for key in ("dropped", "dropped_images")
        },
        "lengths": _histogram(np.concatenate([_lengths(shards) for shards in opened.values()])),
        "sources": sources,
        "figure": str(figure),
    }


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return sum(map(Counter, counts), Counter())


def lengths_as_text(result: dict[str, Any]) -> str:
    """Return the histograms of `inspect` as text: a line for each bin of each source."""
    lines = []
    for name, counts in result["sources"].items():
        lines.append(f"{name}: tokens of a document")
        starts, documents = counts["lengths"]["from"], counts["lengths"]["documents"]
        for start, count in zip(starts, documents, strict=True):
            bar = "█" * -(-count * _BAR // max(documents))
            lines.append(f"{start:>9,} – {2 * start - 1:<9,} {bar} {count:,}")
    return "\n".join(lines)


class FoundDocument(NamedTuple):
    """An encoded document: its source, its name there, and its ids, integers [tokens]."""

    source: str
    name: str
    ids: np.ndarray


def find_document(folder: Path, source: str | None, split: str, document: int) -> FoundDocument:
    """Find an encoded document; the parameters are those of `decode_document`.

    Raises:
        UserError: there is no such source, split or document.
    """
    opened = _open(folder, source, _vocabulary_of(folder))
    if len(opened) > 1:
        raise UserError(
            f"--document {document}: needs a source; give --source with one of {list_names(opened)}"
        )
    if split not in SPLITS:
        raise UserError(f"--split {split}: use {' or '.join(SPLITS)}")
    ((name, shards),) = opened.items()
    encoded = shards.splits[split]
    if not 1 <= document <= len(encoded):
        raise UserError(
            f"--document {document}: {name} has the documents 1 to {len(encoded)} in {split}"
            if len(encoded)
            else f"--document {document}: {name} has no documents in {split}"
        )
    row = document - 1
    return FoundDocument(name, encoded.name(row), encoded.ids(row))


def decode_document(
    folder: Path, source: str | None, split: str, document: int, out: Path
) -> dict[str, Any]:
    """Decode an encoded document to text and images.

    Args:
        source: name of the source; may be None if there is only one.
        document: number of the document in that split, from 1.
        out: folder for the images.

    Returns:
        `source`, `split`, `document`, `name`, `tokens`, and `segments`, each with `type` (`text` or
        `image`) and `text`, or `image`: the path of a PNG file.

    Raises:
        UserError: there is no such source, split or document.
    """
    vocabulary = _vocabulary_of(folder)
    found = find_document(folder, source, split, document)
    stem = f"{found.source}-{split}-{document}"
    return {
        "source": found.source,
        "split": split,
        "document": document,
        "name": found.name,
        "tokens": len(found.ids),
        "segments": _decode(found.ids, Tokenizers(folder), vocabulary, out, stem),
    }


def document_as_text(decoded: dict[str, Any]) -> str:
    """Return a document of `decode_document` for reading."""
    title = "{source}, {split}, document {document}: {name} ({tokens} tokens)".format(**decoded)
    return "\n".join([title, *(one.get("text") or one["image"] for one in decoded["segments"])])


def _decode(
    ids: np.ndarray, tokenizers: Tokenizers, vocabulary: Vocabulary, out: Path, name: str
) -> list[dict[str, str]]:
    """Return the segments of a document; image N is written to `NAME-N.png`."""
    inside = ids[1:-1]
    starts = np.flatnonzero(inside == vocabulary.begin_image)
    ends = np.flatnonzero(inside == vocabulary.end_image) + 1
    parts = np.split(inside, np.sort(np.concatenate([starts, ends])))
    tokenizer = load_text_tokenizer(tokenizers.text)
    codec = ImageCodec.load(tokenizers.codec) if len(starts) else None
    segments: list[dict[str, str]] = []
    images = 0
    for part in filter(len, parts):
        if codec is None or part[0] != vocabulary.begin_image:
            segments.append({"type": "text", "text": tokenizer.decode(part.tolist())})
            continue
        images += 1
        path = out / f"{name}-{images}.png"
        codes_L = torch.from_numpy(vocabulary.code_of_id[part[1:-1]])
        write_output(path, png_bytes(to_pil(codec.decode(codes_L[None])[0])))
        segments.append({"type": "image", "image": str(path)})
    return segments


def _vocabulary_of(folder: Path) -> Vocabulary:
    require_data_folder(folder)
    return Vocabulary.load(Tokenizers(folder).vocabulary)


def _open(folder: Path, source: str | None, vocabulary: Vocabulary) -> dict[str, Shards]:
    """The shards of all sources or of one; of a source that is not complete, what exists."""
    found = sorted(path.parent.name for path in folder.glob("shards/*/shard.json"))
    complete = [name for name in found if not name.endswith((".partial", ".old"))]
    partial = {path.stem: path for path in sorted(folder.glob("shards/*.partial"))}
    names = sorted({*complete, *partial})
    if not names:
        raise UserError(f"{folder}: has no shards; run `moma prepare`")
    if source is not None and source not in names:
        raise UserError(f"--source {source}: {folder} has {list_names(names)}; name one of them")
    chosen = names if source is None else [source]
    opened = open_sources(folder, [name for name in chosen if name in complete], vocabulary)
    for name in chosen:
        if name not in opened:
            opened[name] = open_unfinished(partial[name])
    return opened


def _describe(shards: Shards, vocabulary: Vocabulary) -> dict[str, Any]:
    total = shards.info.whole.total
    image_tokens = total.images * vocabulary.codes_per_image
    return {
        **total.model_dump(),
        "text_tokens": total.tokens - image_tokens,
        "image_tokens": image_tokens,
        "rejected": shards.info.rejected,
        "dropped": shards.info.dropped,
        "dropped_images": shards.info.dropped_images,
        "lengths": _histogram(_lengths(shards)),
        "splits": {name: counts.model_dump() for name, counts in shards.info.counts.items()},
    }


def _lengths(shards: Shards) -> np.ndarray:
    return np.concatenate([encoded.lengths for encoded in shards.splits.values()])


def _histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Return the number of lengths in 1, 2 – 3, 4 – 7, …: from the first bin used to the last."""
    exponents = np.log2(np.maximum(lengths, 1)).astype(np.int64)
    counts = np.bincount(exponents)
    first = int(np.argmax(counts > 0))
    return {"from": [2**n for n in range(first, len(counts))], "documents": counts[first:].tolist()}


def _plot(histograms: Mapping[str, dict[str, list[int]]], path: Path) -> None:
    """Plot the histograms of the first sources, one below another."""
    # Seconds to import, which other commands should not pay.
    from matplotlib.figure import Figure

    shown = [*histograms.items()][:_MAX_PANELS]
    figure = Figure(figsize=(7, 1.2 + 1.6 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, bins) in zip(panels, shown, strict=True):
        starts = np.array(bins["from"])
        panel.bar(starts, bins["documents"], width=starts, align="edge", edgecolor="white")
        panel.set_xscale("log", base=2)
        panel.set_ylabel("documents")
        panel.set_title(name, loc="left", fontsize="medium")
    panels[-1].set_xlabel("tokens of a document")
    write_output(path, png_bytes(figure, dpi=100))
