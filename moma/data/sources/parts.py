"""Cutting the files of a source into parts that can be read independently.

Small files are read together; a large file of lines is cut at the starts of lines, which are found
by reading it once. Where a part begins depends on the files only.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moma.data.documents import SourcePart
from moma.data.sources.jsonl import decompress
from moma.data.sources.paths import FileRange, read_errors
from moma.data.sources.reading import content_hash
from moma.errors import UserError
from moma.files import open_regular

# What an image counts where rows only name it: the size of a photograph of 512 × 512 pixels.
IMAGE_BYTES = 2**17
BLOCK_BYTES = 2**22
PART_BYTES = 2**28
_NEWLINE = ord("\n")


class Cut(NamedTuple):
    """A place where a file can be cut.

    Attributes:
        offset: where it is.
        row: number of rows before what follows: after the end of a file, in the next one.
        size: bytes since the cut before.
    """

    offset: int
    row: int
    size: int


Cuts = Callable[[Path], Iterator[Cut]]


def cut_files(files: Sequence[Path], part_bytes: int, cuts_of: Cuts) -> list[SourcePart]:
    """Cut files into parts of about `part_bytes`.

    Args:
        files: the files of the source, in their order.
        cuts_of: where a file can be cut; the last one is its end.
    """
    parts: list[SourcePart] = []
    first = begin = row = size = 0
    for index, file in enumerate(files):
        *inside, end = cuts_of(file)
        for cut in (*inside, end):
            size += cut.size
            is_end = cut is end
            if size < part_bytes and not (is_end and index == len(files) - 1):
                continue
            parts.append(
                SourcePart(
                    first=first,
                    stop=index + 1,
                    begin=begin,
                    end=None if is_end else cut.offset,
                    row=row,
                    file=str(files[first]),
                    names=_hash_of_names(files[first : index + 1]),
                    size=size,
                )
            )
            first, begin = (index + 1, 0) if is_end else (index, cut.offset)
            row, size = cut.row, 0
    return parts


def ranges_of(files: Sequence[Path], part: SourcePart) -> list[FileRange]:
    """Return what a part reads of the files of its source.

    Raises:
        UserError: the files are not those that were cut into parts.
    """
    if part.stop is None:
        return [*map(FileRange, files)]
    chosen = files[part.first : part.stop]
    if _hash_of_names(chosen) != part.names:
        raise UserError(
            f"{part.file}: files of its source were added or removed while they were being "
            "prepared; run the same command again"
        )
    ranges = [FileRange(path) for path in chosen]
    ranges[0] = ranges[0]._replace(begin=part.begin, row=part.row)
    ranges[-1] = ranges[-1]._replace(end=part.end)
    return ranges


def _hash_of_names(files: Sequence[Path]) -> str:
    return content_hash(*map(os.fsencode, files))


def whole_file(path: Path) -> Iterator[Cut]:
    """Yield the end of a file that cannot be cut."""
    with read_errors(path):
        size = os.stat(path).st_size
    yield Cut(size, 0, size)


def line_cuts(
    path: Path, part_bytes: int, row_bytes: int = 0, between_paragraphs: bool = False
) -> Iterator[Cut]:
    """Yield where an uncompressed file of lines can be cut into parts of about `part_bytes`.

    Args:
        row_bytes: what a row counts in addition to its bytes, for the images that it names.
        between_paragraphs: whether a cut must follow an empty line.
    """
    (end,) = whole_file(path)
    if end.size < part_bytes and not row_bytes:
        yield end
        return
    with read_errors(path), open_regular(path) as file:
        if decompress(file) is not file:
            yield end
            return
        offset = row = taken = 0
        before = b"  "  # the last two bytes of the block before
        while block := file.read(BLOCK_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE) + 1
            offsets, rows = offset + ends, row + 1 + np.arange(len(ends))
            weights = offsets + rows * row_bytes
            usable = offsets < end.offset
            if between_paragraphs:
                usable &= _follow_empty_lines(before + block, ends)
            offsets, rows, weights = offsets[usable], rows[usable], weights[usable]
            while (index := np.searchsorted(weights, taken + part_bytes)) < len(weights):
                yield Cut(int(offsets[index]), int(rows[index]), int(weights[index]) - taken)
                taken = int(weights[index])
            offset, row, before = offset + len(block), row + len(ends), (before + block[-2:])[-2:]
    yield Cut(offset, 0, offset + row * row_bytes - taken)


def _follow_empty_lines(data: bytes, ends: np.ndarray) -> np.ndarray:
    """Whether the lines with these ends are empty; `data` begins two bytes before the block."""
    values = np.frombuffer(data, np.uint8)
    last, before = values[ends], values[ends - 1]
    return (last == _NEWLINE) | ((last == ord("\r")) & (before == _NEWLINE))
