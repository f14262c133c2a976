"""A folder of HTML pages with images, each page walked in reading order.

page → elements, without navigation → lines of text and images, without decoration → document
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from lxml import etree
from pydantic import Field

from moma.data.documents import Document, ImageRef, Rejected, Segment, SourceName
from moma.data.sources.paths import files_below, fingerprint_of, resolve_inside
from moma.data.sources.reading import MAX_ROW_BYTES, ImageReaderConfig, attempt, check_text
from moma.errors import UserError
from moma.images import SUFFIXES, image_size
from moma.recipe import RequiredPath

_PAGES = (".html", ".htm", ".xhtml")
_NEVER_SHOWN = frozenset(
    {
        *("head", "script", "style", "noscript", "template", "iframe", "object", "svg"),
        *("nav", "footer", "aside", "form", "button", "select", "textarea"),
    }
)
_NAVIGATION_ROLES = frozenset({"navigation", "banner", "contentinfo", "search", "menu"})
# A `header` inside of these holds a headline, elsewhere it is the site's.
_CONTENT = ("article", "main", "section")
_BLOCKS = frozenset(
    {
        *("address", "article", "blockquote", "body", "br", "caption", "dd", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr"),
        *("li", "main", "ol", "p", "section", "table", "tbody", "thead", "tfoot", "tr", "ul"),
    }
)
_CELLS = ("td", "th")
# An image's address in `srcset`, and how large it is.
_CANDIDATE = re.compile(r"([^\s,](?:\S*[^\s,])?)(?:\s+([\d.]+)[wx])?\s*(?:,|$)")


class HtmlConfig(ImageReaderConfig):
    """A folder of HTML pages with images; every page is a document, named by its path.

    Navigation, headers, footers and what is never shown are left out: elements such as `nav`, and
    those with one of `drop_classes`. So are decorations: images with a side under `min_side`,
    those on more than `max_page_share` of the pages (and on more than one page), SVG drawings, and
    images that are not files of the folder but lie in the web or in the page. An image that is
    loaded late is read from `data-src` or the largest of `srcset`, its own or a `image`'s.

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

    def read_documents(self) -> Iterator[Document | Rejected]:
        """Yield a document for every page."""
        pages = self._pages()
        shown_on: Counter[Path] = Counter()
        for page in pages:
            shown_on.update(self._images_on(page))
        most = max(1, self.max_page_share * len(pages))
        # An image on many pages is measured once; that of one page is not remembered for long.
        large = lru_cache(maxsize=4096)(self._is_large)

        def is_content(path: Path) -> bool:
            return shown_on[path] <= most and large(path)

        for page in pages:
            yield attempt(str(page), partial(self._document, page, is_content))

    def fingerprint(self) -> str:
        """Changes when pages or images come or go, or the size or time of one does."""
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
            return set()  # rejected when its document is made

    def _is_large(self, path: Path) -> bool:
        size = image_size(path)
        # What has no size is missing or damaged: reading it will say so.
        return size is None or min(size) >= self.min_side

    def _document(self, page: Path, is_content: Callable[[Path], bool]) -> Document:
        name = check_text(page.relative_to(self.path).as_posix(), "of its name")
        text = _Text()
        segments: list[Segment] = []
        for part in self._parts(page):
            if isinstance(part, str):
                text.add(part)
            elif isinstance(part, _Preformatted):
                text.add_lines(part.lines)
            elif part is None:
                text.end_line()
            elif is_content(part):
                segments += [
                    *text.take(),
                    self.image_ref(part, str(page), "remove it from the page"),
                ]
        segments += text.take()
        if not segments:
            raise UserError("no text and no image is left of it; remove the page")
        for segment in segments:
            if not isinstance(segment, ImageRef):
                check_text(segment, "of the page")
        return Document(name=name, segments=tuple(segments), row=str(page))

    def _parts(self, page: Path) -> Iterator["str | _Preformatted | Path | None"]:
        """Text, images' files, and None where a line ends, in reading order."""
        walk = etree.iterwalk(_parse(page, self.path), events=("start", "end"))
        for event, element in walk:
            if event == "start" and self._is_dropped(element):
                walk.skip_subtree()
                continue
            if element.tag in _BLOCKS:
                yield None
            if event == "start" and element.tag == "pre":
                walk.skip_subtree()
                yield from _preformatted(element)
            elif event == "start":
                yield from _text_and_image(element, page, self.path)
            else:
                if element.tag in _CELLS:
                    yield " "
                yield element.tail or ""

    def _is_dropped(self, element: Any) -> bool:
        if element.tag in _NEVER_SHOWN or element.get("role") in _NAVIGATION_ROLES:
            return True
        if element.tag == "header" and next(element.iterancestors(*_CONTENT), None) is None:
            return True
        hidden = element.get("hidden") is not None or element.get("aria-hidden") == "true"
        return hidden or not set(self.drop_classes).isdisjoint(element.get("class", "").split())


@dataclass(frozen=True)
class _Preformatted:
    """Text whose white space counts."""

    lines: str


class _Text:
    """Text between two images: lines without surplus white space."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._lines: list[str] = []

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def add_lines(self, lines: str) -> None:
        self.end_line()
        self._lines.append(lines)

    def end_line(self) -> None:
        line = " ".join("".join(self._pieces).split())
        self._pieces = []
        if line:
            self._lines.append(line)

    def take(self) -> list[str]:
        """The text so far, if there is any; begins anew."""
        self.end_line()
        text, self._lines = "\n".join(self._lines), []
        return [text] if text else []


def _parse(page: Path, folder: Path) -> Any:
    resolve_inside(folder, str(page.relative_to(folder)))
    try:
        if page.stat().st_size > MAX_ROW_BYTES:
            raise UserError(f"longer than {MAX_ROW_BYTES >> 20} MiB; break it up or remove it")
        data = page.read_bytes()
        encoding = _encoding(data)
        parser = etree.HTMLParser(
            remove_comments=True,
            remove_pis=True,
            no_network=True,
            encoding=encoding,
            huge_tree=True,  # else what is nested deeper than 256 elements is dropped
        )
        root = etree.fromstring(data, parser)
    except (OSError, LookupError, etree.LxmlError) as error:
        raise UserError(f"cannot read it ({error}); save it again as UTF-8") from error
    # Whatever is beyond the parser's limits, it drops without raising.
    dropped = parser.error_log.filter_from_level(etree.ErrorLevels.FATAL).filter_types(
        [etree.ErrorTypes.ERR_RESOURCE_LIMIT]
    )
    if dropped:
        told = dropped[0].message.partition(",")[0]
        raise UserError(f"cannot read all of it ({told}); simplify the page or remove it")
    if root is None:
        raise UserError("holds nothing; remove the page")
    return root


def _encoding(data: bytes) -> str | None:
    """UTF-8 if it is, else None: as the page itself says."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return "utf-8"


def _preformatted(element: Any) -> Iterator[_Preformatted]:
    text = "".join(element.itertext()).strip("\r\n").rstrip()
    if text:
        yield _Preformatted(text)


def _text_and_image(element: Any, page: Path, folder: Path) -> Iterator[str | Path]:
    if element.tag == "img":
        paths = (_image_path(address, page, folder) for address in _addresses(element))
        images = [path for path in paths if path is not None]
        # One that is missing is told when it is read.
        yield from ([path for path in images if path.is_file()] or images)[:1]
    yield element.text or ""


def _addresses(element: Any) -> Iterator[str]:
    """Where an `img` may have its image: the first that is a file counts."""
    for key in ("src", "data-src"):
        yield (element.get(key) or "").strip()
    # The parser takes a `source` for something that holds what follows.
    sources = (
        each for parent in element.iterancestors("picture") for each in parent.iter("source")
    )
    for candidate in (element, *sources):
        for key in ("srcset", "data-srcset"):
            candidates = _CANDIDATE.findall(candidate.get(key) or "")
            by_size = sorted(candidates, key=lambda found: _number(found[1]), reverse=True)
            yield from (address for address, _ in by_size)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _image_path(source: str, page: Path, folder: Path) -> Path | None:
    """The image's file; None if it is none, but lies in the web or in the page.

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
    return resolve_inside(folder, str(page.parent.relative_to(folder) / name))
