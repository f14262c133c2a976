"""A folder of HTML pages with images, each page walked in reading order.

page → text → elements, without navigation → lines of text and images, without decoration
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field
from selectolax.lexbor import LexborNode

from moma.data.documents import Document, SourceName, SourcePart
from moma.data.sources.html_decoding import decode_html
from moma.data.sources.html_layout import BLOCKS, TextLayout, element_names, parse_html, walk
from moma.data.sources.paths import files_below, fingerprint_of, read_errors, resolve_inside
from moma.data.sources.reading import MAX_ROW_BYTES, ImageReaderConfig, Row, check_text
from moma.errors import UserError
from moma.files import open_regular
from moma.images import SUFFIXES, image_size
from moma.recipe import RequiredPath

_PAGES = (".html", ".htm", ".xhtml")
# Elements that a browser does not show, or whose content it does not show, and navigation.
_DROPPED = element_names(
    "annotation annotation-xml applet audio canvas datalist head iframe meter noembed noframes "
    "noscript object progress script style svg template title video "
    "nav footer aside form button select textarea"
)
_NAVIGATION_ROLES = frozenset({"navigation", "banner", "contentinfo", "search", "menu"})
# A `header` inside of these holds a headline, elsewhere it is the site's.
_CONTENT = frozenset({"article", "main", "section"})
_HIDDEN_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)\b", re.I)
# An image's address in `srcset` and its size; without a size the address ends with the comma.
_CANDIDATE = re.compile(r"([^\s,]\S*+)(?:(?<=,)|([^,]*+))")
_MAX_PICTURE_SOURCES = 32


class HtmlConfig(ImageReaderConfig):
    """A folder of HTML pages with images; every page is a document, named by its path.

    Text is laid out as a browser shows it. Navigation, headers, footers and what is never shown
    are left out: elements such as `nav`, and those with one of `drop_classes`. So are decorations:
    images with a side under `min_side`, those on more than `max_page_share` of the pages (and on
    more than one page), SVG drawings, and images that are not files of the folder. An image that
    is loaded late is read from `data-src` or from the largest of `srcset`, its own or that of its
    `picture`.

    Attributes:
        path: the folder; folders below it are read too, hidden ones are not.
        min_side: shortest side of an image in pixels.
        max_page_share: largest share of the pages that may show an image.
        drop_classes: classes of elements to leave out.
    """

    kind: Literal["html"] = "html"
    name: SourceName = "html"
    path: RequiredPath
    min_side: int = Field(default=64, ge=1)
    max_page_share: float = Field(default=0.02, gt=0, le=1)
    drop_classes: tuple[str, ...] = (
        *("nav", "navbar", "navheader", "navfooter", "navigation", "breadcrumb", "breadcrumbs"),
        *("menu", "sidebar", "toc", "footer"),
    )

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the pages."""
        pages = self._pages()
        shown_on: Counter[Path] = Counter()
        for page in pages:
            shown_on.update(self._images_on(page))
        max_pages = max(1, self.max_page_share * len(pages))

        # An image of many pages is measured once; one of a single page need not be remembered.
        @lru_cache(maxsize=4096)
        def is_content(path: Path) -> bool:
            if shown_on[path] > max_pages:
                return False
            size = image_size(path)
            # A missing or damaged image has no size: reading it reports that.
            return size is None or min(size) >= self.min_side

        for page in pages:
            yield str(page), partial(self._document, page, is_content)

    def fingerprint(self) -> str:
        """Changes when pages or images come or go, or the size or time of one changes."""
        kinds = (*_PAGES, *SUFFIXES)
        return fingerprint_of(p for p in files_below(self.path) if p.suffix.lower() in kinds)

    def _pages(self) -> list[Path]:
        pages = [path for path in files_below(self.path) if path.suffix.lower() in _PAGES]
        if not pages:
            raise UserError(f"{self.path}: holds no HTML page; check the source's 'path'")
        return pages

    def _images_on(self, page: Path) -> set[Path]:
        try:
            return {part for part in self._parts(page) if isinstance(part, Path)}
        except UserError:
            return set()  # reported when its document is made

    def _document(self, page: Path, is_content: Callable[[Path], bool]) -> Document:
        name = check_text(page.relative_to(self.path).as_posix(), "of its name")
        segments = tuple(
            check_text(part, "of the page")
            if isinstance(part, str)
            else self.image_ref(part, str(page), "remove it from the page")
            for part in self._parts(page, is_content)
        )
        if not segments:
            raise UserError("no text and no image is left of it; remove the page")
        return Document(name, segments)

    def _parts(
        self, page: Path, is_content: Callable[[Path], bool] = lambda path: True
    ) -> Iterator[str | Path]:
        """Texts between images, and the files of images, in reading order."""
        layout = TextLayout()
        open_content: list[str] = []
        is_dropped = partial(self._is_dropped, open_content)
        root = _read(page, self.path)
        base = _base_folder(root, page, self.path)
        for event, node in walk(root, is_dropped):
            tag = node.tag or ""
            if event == "text":
                layout.text(node.text_content or "")
            elif event == "dropped":
                if tag in BLOCKS and not _is_hidden(tag, node.attributes):
                    layout.end_line()
            elif event == "end":
                layout.end(tag)
                if tag in _CONTENT:
                    open_content.pop()
            else:
                layout.start(tag)
                if tag in _CONTENT:
                    open_content.append(tag)
                image = _image_file(node, base, self.path) if tag == "img" else None
                if image is not None and is_content(image):
                    yield from layout.take()
                    yield image
        yield from layout.take()

    def _is_dropped(self, open_content: list[str], node: LexborNode) -> bool:
        tag, attributes = node.tag or "", node.attributes
        return (
            tag in _DROPPED
            or (tag == "header" and not open_content)
            or _is_hidden(tag, attributes)
            or attributes.get("role") in _NAVIGATION_ROLES
            or not set((attributes.get("class") or "").split()).isdisjoint(self.drop_classes)
        )


def _read(page: Path, folder: Path) -> LexborNode:
    """The root element of a page."""
    resolve_inside(folder, str(page.relative_to(folder)))
    with read_errors(page, "remove the page"), open_regular(page) as file:
        data = file.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise UserError(f"longer than {MAX_ROW_BYTES >> 20} MiB; split or remove the page")
    text = decode_html(data)
    is_xml = page.suffix.lower() == ".xhtml" or text.lstrip().startswith("<?xml")
    return parse_html(text, is_xml)


def _is_hidden(tag: str, attributes: dict[str, str | None]) -> bool:
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or (tag == "dialog" and "open" not in attributes)
        or _HIDDEN_STYLE.search(attributes.get("style") or "") is not None
    )


def _base_folder(root: LexborNode, page: Path, folder: Path) -> Path:
    """The folder that a page's addresses are relative to, unless its `base` is in the web."""
    element = root.css_first("base[href]")
    try:
        base = urlsplit((element.attributes["href"] or "").strip() if element is not None else "")
    except ValueError:
        return page.parent
    if base.scheme or base.netloc:  # a saved page, whose images are beside it
        return page.parent
    name = unquote(base.path)
    path = name.rpartition("/")[0].lstrip("/")
    return (folder if name.startswith("/") else page.parent) / path


def _image_file(element: LexborNode, base: Path, folder: Path) -> Path | None:
    """The file of an `img`: the first address that is a file, else the first that could be one."""
    paths = (_image_path(address, base, folder) for address in _addresses(element))
    candidates = [path for path in paths if path is not None]
    # A missing file is reported when it is read.
    return next((path for path in candidates if path.is_file()), next(iter(candidates), None))


def _addresses(element: LexborNode) -> Iterator[str]:
    """Where an `img` may have its image, the most likely address first."""
    for key in ("src", "data-src"):
        yield (element.attributes.get(key) or "").strip()
    picture = element.parent
    siblings = picture.iter() if picture is not None and picture.tag == "picture" else iter(())
    sources = (node for node in siblings if node.tag == "source")
    for candidate in (element, *islice(sources, _MAX_PICTURE_SOURCES)):
        for key in ("srcset", "data-srcset"):
            candidates = _CANDIDATE.findall(candidate.attributes.get(key) or "")
            for address, _ in sorted(candidates, key=lambda found: _size(found[1]), reverse=True):
                yield address.rstrip(",")


def _size(descriptor: str) -> float:
    """The number of a width such as `640w` or a density such as `2x`."""
    try:
        return float(descriptor.strip().rstrip("wx"))
    except ValueError:
        return 0.0


def _image_path(source: str, base: Path, folder: Path) -> Path | None:
    """The image's file; None for an address in the web or in the page, and for a drawing.

    Raises:
        UserError: the path leads out of the folder.
    """
    try:
        address = urlsplit(source)
    except ValueError:
        return None
    name = unquote(address.path)
    if address.scheme or address.netloc or not name or name.lower().endswith(".svg"):
        return None
    if name.startswith("/"):
        return resolve_inside(folder, name.lstrip("/"))
    return resolve_inside(folder, str(base.relative_to(folder) / name))
