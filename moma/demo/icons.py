"""Icons of the npm package `@iconify/json`, captioned with their names.

    collections.json → sets → json/SET.json → icons → documents

A set is one file, which is read whole. Of an icon the file has the inside of an SVG image, which is
not trusted: it is drawn at a fixed size and may not refer to files.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image, ImageOps
from pydantic import Field

from moma.data.documents import Document, ImageRef, SourceName, SourcePart
from moma.data.sources.jsonl import require_text
from moma.data.sources.listings import listed_once
from moma.data.sources.parts import IMAGE_BYTES, Cut, cut_files, ranges_of, whole_file
from moma.data.sources.paths import fingerprint_of, read_errors
from moma.data.sources.reading import CaptionedConfig, ReaderConfig, Row, check_text, content_hash
from moma.demo.dictionary import package_folder
from moma.errors import UserError, error_reason, list_names, quote, shorten
from moma.files import read_bounded
from moma.images import on_white
from moma.recipe import RequiredPath
from moma.svg import draw_svg

_COLLECTIONS = "collections.json"
_REMEDY = "unpack the npm package @iconify/json there, or check the source's 'path'"
_PREFIX = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# Of a set, which is one file.
_MAX_ICONS = 10**9
# What an icon is where neither it nor its set says otherwise.
_DEFAULTS = {"left": 0, "top": 0, "width": 16, "height": 16, "rotate": 0}


class _Set(NamedTuple):
    """A set's name in words, and about how many icons it has."""

    name: str
    icons: int


class IconsConfig(CaptionedConfig, ReaderConfig):
    """Icons of the unpacked npm package `@iconify/json`, on white: `red apple, Noto Emoji`.

    A caption is the name of the icon and that of its set. Hidden icons, and aliases, which are
    other names or turned copies of an icon, are left out. A document is named by set and icon:
    `noto:red-apple`. A hash of the drawing decides whether it is held out, so that equal drawings,
    of one set or several, are held out together.

    Attributes:
        path: the folder that contains `collections.json` and `json/`.
        sets: prefixes of the sets that are read, such as `noto`; by default all coloured ones.
        image_size: side of an image in pixels.
    """

    kind: Literal["icons"] = "icons"
    name: SourceName = "icons"
    path: RequiredPath
    sets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    image_size: int = Field(default=64, ge=8, le=2048)

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the source between sets."""
        sets = _sets(self.path, self.sets)

        def cuts_of(file: Path) -> Iterator[Cut]:
            (end,) = whole_file(file)
            yield end._replace(size=end.size + sets[file].icons * IMAGE_BYTES)

        return cut_files([*sets], part_bytes, cuts_of)

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the icons that are not hidden, by set.

        Raises:
            UserError: a file cannot be read, or the package that draws is missing.
        """
        sets = _sets(self.path, self.sets)
        package_folder("resvg_py", "resvg-py")
        for file, *_ in ranges_of([*sets], part):
            yield from self._rows_of(file, sets[file].name)

    def fingerprint(self) -> str:
        """Return what changes with the size or the time of a set's file."""
        return fingerprint_of([self.path / _COLLECTIONS, *_sets(self.path, self.sets)])

    # Of its own, so that a set is freed before the next one is read.
    def _rows_of(self, file: Path, set_name: str) -> Iterator[Row]:
        defaults = _read_object(file)
        icons = defaults.pop("icons", None)
        if not isinstance(icons, dict):
            raise UserError(f"{file}: has no 'icons'; {_REMEDY}")
        for name, icon in icons.items():
            if not isinstance(icon, dict) or not icon.get("hidden"):
                location = shorten(f"{file}, {name}")
                caption = f"{name.replace('-', ' ')}, {set_name}"
                names = (f"{file.stem}:{name}", caption, location)
                yield location, partial(self._document, *names, icon, defaults)

    def _document(
        self, name: str, caption: str, location: str, icon: Any, defaults: dict[str, Any]
    ) -> Document:
        if not isinstance(icon, dict):
            raise UserError("the icon is not an object; leave its set out of 'sets'")
        body = require_text(icon, "body")
        view = {key: _number(key, icon, defaults) for key in _DEFAULTS}
        flips = bool(icon.get("hFlip")), bool(icon.get("vFlip"))
        image = ImageRef(location, partial(_draw, body, view, flips, self.image_size, location))
        segments = self.with_caption(name, check_text(caption, "of its name"), image)
        return Document(name, segments, held_out_with=content_hash(body))


@listed_once
def _sets(folder: Path, prefixes: tuple[str, ...] | None) -> dict[Path, _Set]:
    """The files of the sets with these prefixes, or of all coloured ones, in a fixed order."""
    file = folder / _COLLECTIONS
    sets: dict[Path, _Set] = {}
    collections = _read_object(file)
    for prefix, values in sorted(collections.items()):
        if not isinstance(values, dict) or not _PREFIX.fullmatch(prefix):
            raise UserError(f"{file}: {quote(prefix)} is not a set; {_REMEDY}")
        if prefix in prefixes if prefixes is not None else values.get("palette"):
            total = values.get("total", 0)
            if not isinstance(total, int) or not 0 <= total <= _MAX_ICONS:
                raise UserError(f"{file}: 'total' of {prefix} is not a number of icons; {_REMEDY}")
            sets[folder / "json" / f"{prefix}.json"] = _Set(str(values.get("name", prefix)), total)
    if unknown := set(prefixes or ()) - collections.keys():
        raise UserError(f"{file}: has no set {list_names(sorted(unknown))}; correct 'sets'")
    if not sets:
        raise UserError(f"{file}: has no coloured sets; choose some with 'sets'")
    return sets


def _read_object(file: Path) -> dict[str, Any]:
    with read_errors(file, _REMEDY, ValueError, RecursionError):
        values = json.loads(read_bounded(file))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    return values


def _number(key: str, icon: dict[str, Any], defaults: dict[str, Any]) -> float:
    """A measure of an icon: its own, else its set's, else the format's."""
    value = icon.get(key, defaults.get(key, _DEFAULTS[key]))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite, which fails on integers that are larger than any float.
    if not is_number or not abs(value) <= sys.float_info.max:
        raise UserError(f"{quote(key)} is not a number; leave its set out of 'sets'")
    if key in ("width", "height") and value <= 0:
        raise UserError(f"{quote(key)} is not a positive number; leave its set out of 'sets'")
    return value


def _draw(
    body: str, view: dict[str, float], flips: tuple[bool, bool], size: int, location: str
) -> Image.Image:
    """Draw an icon in the middle of a white square, RGB."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" '
        f'viewBox="{view["left"]} {view["top"]} {view["width"]} {view["height"]}">{body}</svg>'
    )
    try:
        image = on_white(draw_svg(svg.encode(), size, location))
    except ValueError as error:
        reason = shorten(error_reason(error), 200)
        raise UserError(
            f"{location}: cannot draw it ({reason}); leave its set out of 'sets'"
        ) from error
    mirrored, flipped = flips
    image = ImageOps.mirror(image) if mirrored else image
    image = ImageOps.flip(image) if flipped else image
    return image.rotate(-90 * (int(view["rotate"]) % 4))
