"""What a prepared folder holds: counts, lengths, and documents decoded again.

shards → counts and lengths by source → JSON, text, `lengths.png`
a row  → ids → text and images → `SOURCE-SPLIT-ROW-1.png`, …
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moma.data.outputs import mark_output
from moma.data.provenance import read_provenance
from moma.data.shards import SPLITS, Shard, Shards, open_shards
from moma.errors import UserError
from moma.recipe import recipe_value
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, to_pil
from moma.tokenizers.text import load_text_tokenizer
from moma.vocabulary import Vocabulary

_BAR = 40  # characters


def inspect(folder: Path, source: str | None, out: Path) -> dict[str, Any]:
    """Count what the shards of a folder hold, and draw the lengths of the documents.

    Args:
        folder: a folder that `moma prepare` wrote.
        source: only this source; None for all.
        out: folder for `lengths.png`.

    Returns:
        `path`, `figure`, and of all sources together as of each in `sources`: `documents`,
        `tokens`, `text_tokens`, `image_tokens` (codes; an image's boundaries are text),
        `images`, `rejected`, `lengths`: `from` and `documents`, the least length of each class
        and how many documents are in it. Each source also has `splits`: the counts by split.

    Raises:
        UserError: the folder is not prepared, or has no such source.
    """
    vocabulary = _vocabulary_of(folder)
    opened = _open(folder, source, vocabulary)
    sources = {name: _describe(shards, vocabulary) for name, shards in opened.items()}
    keys = ("documents", "tokens", "text_tokens", "image_tokens", "images", "rejected")
    lengths = np.concatenate([_lengths(shards) for shards in opened.values()])
    result = {
        "path": str(folder),
        **{key: sum(one[key] for one in sources.values()) for key in keys},
        "lengths": _classes(lengths),
        "sources": sources,
    }
    figure = out / "lengths.png"
    mark_output(out, figure.name)
    _draw({name: one["lengths"] for name, one in sources.items()}, figure)
    return {**result, "figure": str(figure)}


def histogram(result: dict[str, Any]) -> str:
    """The lengths that `inspect` counted, as lines of text: a bar for each class and source."""
    lines = []
    for name, one in result["sources"].items():
        lines.append(f"{name}: tokens of a document")
        starts, counts = one["lengths"]["from"], one["lengths"]["documents"]
        for start, count in zip(starts, counts, strict=True):
            bar = "█" * -(-count * _BAR // max(counts))
            lines.append(f"{start:>9,} – {2 * start - 1:<9,} {bar} {count:,}")
    return "\n".join(lines)


def decode_document(
    folder: Path, source: str | None, split: str, row: int, out: Path
) -> dict[str, Any]:
    """Turn an encoded document back into text and images.

    Args:
        folder: a folder that `moma prepare` wrote.
        source: name of the source; may be None if there is only one.
        split: `train` or `held_out`.
        row: the document's row in that split, from 0.
        out: folder for the images.

    Returns:
        `source`, `split`, `row`, `name`, `tokens`, and `segments`, each with `type` (`text` or
        `image`) and `text`, or `image`: the path of a PNG file.

    Raises:
        UserError: there is no such source, split or document.
    """
    tokenizers = Tokenizers(folder)
    vocabulary = _vocabulary_of(folder)
    name, shard = _shard_of(_open(folder, source, vocabulary), split, row)
    ids = shard.ids(row)
    tokenizer = load_text_tokenizer(tokenizers.text)
    codec = ImageCodec.load(tokenizers.codec) if shard.images[row] else None
    segments: list[dict[str, str]] = []
    for part in _segments(ids, vocabulary):
        if codec is not None and part[0] == vocabulary.begin_image:
            number = sum(segment["type"] == "image" for segment in segments) + 1
            path = out / f"{name}-{split}-{row}-{number}.png"
            codes_L = torch.from_numpy(vocabulary.code_of_id[part[1:-1]])
            mark_output(out, path.name)
            to_pil(codec.decode(codes_L[None])[0]).save(path)
            segments.append({"type": "image", "image": str(path)})
        else:
            segments.append({"type": "text", "text": tokenizer.decode(part.tolist())})
    return {
        "source": name,
        "split": split,
        "row": row,
        "name": shard.dataset[row]["name"],
        "tokens": len(ids),
        "segments": segments,
    }


def as_text(decoded: dict[str, Any]) -> str:
    """A document that `decode_document` decoded, for reading."""
    title = "{source}, {split}, row {row}: {name} ({tokens} tokens)".format(**decoded)
    return "\n".join([title, *(one.get("text") or one["image"] for one in decoded["segments"])])


def _vocabulary_of(folder: Path) -> Vocabulary:
    if folder.is_file():
        data = recipe_value(folder, "data", "path")
        hint = f"this recipe's is {data}" if data else "name one that `moma prepare` wrote"
        raise UserError(f"{folder}: is a file, not a data folder; {hint}")
    return Vocabulary.load(Tokenizers(folder).vocabulary)


def _shard_of(opened: dict[str, Shards], split: str, row: int) -> tuple[str, Shard]:
    """The source that is meant, and its split that has the row."""
    if len(opened) > 1:
        raise UserError(
            f"--document {row}: name one of the sources: --source {' or '.join(opened)}"
        )
    if split not in SPLITS:
        raise UserError(f"--split {split}: use {' or '.join(SPLITS)}")
    ((name, shards),) = opened.items()
    shard = shards.splits[split]
    if not 0 <= row < len(shard):
        raise UserError(f"--document {row}: {name} has {len(shard)} documents in {split}, from 0")
    return name, shard


def _open(folder: Path, source: str | None, vocabulary: Vocabulary) -> dict[str, Shards]:
    found = sorted(path.parent.name for path in folder.glob("shards/*/shard.json"))
    names = [name for name in found if not name.endswith((".partial", ".old"))]
    if not names:
        raise UserError(f"{folder}: holds no complete shards; run `moma prepare`")
    if source is not None and source not in names:
        raise UserError(f"--source {source}: {folder} has {', '.join(names)}")
    chosen = names if source is None else [source]
    provenance = read_provenance(folder)
    encoders = provenance.encoders if provenance else None
    return {name: open_shards(folder / "shards" / name, vocabulary, encoders) for name in chosen}


def _describe(shards: Shards, vocabulary: Vocabulary) -> dict[str, Any]:
    total = shards.info.whole.total
    image_tokens = total.images * vocabulary.codes_per_image
    return {
        **total.model_dump(),
        "text_tokens": total.tokens - image_tokens,
        "image_tokens": image_tokens,
        "rejected": shards.info.rejected,
        "lengths": _classes(_lengths(shards)),
        "splits": {name: counts.model_dump() for name, counts in shards.info.counts.items()},
    }


def _lengths(shards: Shards) -> np.ndarray:
    return np.concatenate([shard.lengths for shard in shards.splits.values()])


def _classes(lengths: np.ndarray) -> dict[str, list[int]]:
    """How many lengths are in 1, 2 – 3, 4 – 7, …: from the first class with any to the last."""
    exponents = np.log2(np.maximum(lengths, 1)).astype(np.int64)
    counts = np.bincount(exponents)
    first = int(np.argmax(counts > 0))
    starts = [2**exponent for exponent in range(first, len(counts))]
    return {"from": starts, "documents": counts[first:].tolist()}


def _draw(lengths: dict[str, dict[str, list[int]]], path: Path) -> None:
    # Seconds to import, which other commands should not pay.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 1.6 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, classes) in zip(panels, lengths.items(), strict=True):
        starts = np.array(classes["from"])
        panel.bar(starts, classes["documents"], width=starts, align="edge", edgecolor="white")
        panel.set_xscale("log", base=2)
        panel.set_ylabel("documents")
        panel.set_title(name, loc="left", fontsize="medium")
    panels[-1].set_xlabel("tokens of a document")
    figure.savefig(path, dpi=100)


def _segments(ids: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    """The parts of a document: texts, and images with their boundaries."""
    inside = ids[1:-1]
    starts = np.flatnonzero(inside == vocabulary.begin_image)
    ends = np.flatnonzero(inside == vocabulary.end_image) + 1
    bounds = sorted([*starts.tolist(), *ends.tolist()])
    return [part for part in np.split(inside, bounds) if len(part)]
