"""Text of an HTML page → its elements, and elements → the lines that a browser would show."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal

from selectolax.lexbor import LexborHTMLParser, LexborNode

from moma.errors import UserError


def element_names(names: str) -> frozenset[str]:
    """Return the names of elements that a text lists."""
    return frozenset(names.split())


# Elements with `display: block` or a `display: table…` in the HTML standard's style sheet.
BLOCKS = element_names(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr html legend li listing main "
    "menu nav ol optgroup option p plaintext pre search section summary table tbody tfoot thead tr "
    "ul xmp"
)
_CELLS = frozenset({"td", "th"})
_PREFORMATTED = frozenset({"listing", "plaintext", "pre", "xmp"})
_VOID = element_names("area base br col embed frame hr img input link meta param source track wbr")
# Elements that the parser closes itself, and links, of which one is open at a time.
_CLOSED_BY_PARSER = element_names(
    "a body dd dt head html li nobr optgroup option p rp rt tbody td tfoot th thead tr"
)
# Elements that the parser repeats in every following block until they are closed.
_FORMATTING = element_names("b big code em font i s small strike strong tt u")
# The parser's time grows with tags × open elements, and its memory with repeated elements.
_MAX_ELEMENTS = 2_000_000
_MAX_PARSER_STEPS = 100_000_000
# A comment; a script or style with its content; another tag. Each with its attributes.
_TOKEN = re.compile(
    r"<!--(?:-?>|.*?(?:--!?>|\Z))"
    r"|<(script|style)(?=[\s/>])([^>]*+)>.*?(?=</\1|\Z)"
    r"|<(/?)([a-z][^\s/>]*+)([^>]*+)",
    re.IGNORECASE | re.DOTALL,
)
_SELF_CLOSED = re.compile(
    r"""<([a-z][^\s/>]*+)((?:[^<>"'/]|/(?!>)|"[^"]*+"|'[^']*+')*+)/>""", re.IGNORECASE
)
_WHITE_SPACE = re.compile(r"[ \t\n\f\r]+")
# A no-break space looks like a space; a soft hyphen and a byte-order mark are invisible.
_APPEARANCE = {0xA0: " ", 0xAD: None, 0xFEFF: None}

Event = tuple[Literal["start", "end", "text", "dropped"], LexborNode]


def parse_html(text: str, is_xml: bool = False) -> LexborNode:
    """Return the root element of a page, as in a browser that runs scripts.

    In XHTML (`is_xml`), `<script/>` is a whole element.

    Raises:
        UserError: the page is empty, or parsing it would take minutes or gigabytes.
    """
    if is_xml:
        text = _SELF_CLOSED.sub(_with_end_tag, text)
    _check_cost(text)
    root = LexborHTMLParser(text, scripting=True).root
    if root is None:
        raise UserError("is empty; remove the page")
    return root


def walk(root: LexborNode, is_dropped: Callable[[LexborNode], bool]) -> Iterator[Event]:
    """Yield elements and texts below `root` in reading order, one event for a dropped element."""
    open_elements: list[LexborNode] = []
    node = root.child
    while node is not None or open_elements:
        if node is None:
            element = open_elements.pop()
            yield "end", element
            node = element.next
        elif node.is_element_node and not is_dropped(node):
            yield "start", node
            open_elements.append(node)
            node = node.child
        else:
            if node.is_text_node:
                yield "text", node
            elif node.is_element_node:
                yield "dropped", node
            node = node.next


class TextLayout:
    """Lines of text as a browser shows them, without blank ones.

    White space is collapsed outside of `pre`, blocks and `br` begin a line, and the cells of a
    table row are on one line unless a cell has several lines. A `q` has English quotation marks.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._line: list[str] = []
        self._line_ended = False
        self._preformatted = 0
        self._in_blank_cell = False
        self._quotations = 0
        self._cells: list[int] = []  # how many lines there were at the start of each open cell

    def start(self, tag: str) -> None:
        """Begin an element."""
        if tag in _CELLS:
            if self._line_ended:
                self._flush_line()
            self._in_blank_cell = True
            self._cells.append(len(self._lines))
        elif tag in _PREFORMATTED:
            self._preformatted += 1
            if self._preformatted == 1:
                self._flush_line()
        elif tag == "q":
            self.text("‘" if self._quotations % 2 else "“")
            self._quotations += 1
        elif tag == "br" or tag in BLOCKS:
            self.end_line(always=tag == "br")

    def end(self, tag: str) -> None:
        """End an element."""
        if tag in _CELLS:
            self._in_blank_cell = False
            self._line_ended = len(self._lines) > self._cells.pop()
            if not self._line_ended:
                self._line.append(" ")
        elif tag in _PREFORMATTED:
            self._preformatted -= 1
            if not self._preformatted:
                self._flush_line(preformatted=True)
        elif tag == "q":
            self._quotations -= 1
            self.text("’" if self._quotations % 2 else "”")
        elif tag in BLOCKS:
            self.end_line()

    def text(self, text: str) -> None:
        """Add text."""
        if self._preformatted:
            self._line.append(text)
            self._in_blank_cell = False
        elif text.strip(" \t\n\f\r"):
            if self._line_ended:
                self._flush_line()
            self._line.append(text)
            self._in_blank_cell = False
        elif self._line:
            self._line.append(" ")

    def end_line(self, always: bool = False) -> None:
        """End the line, if there is text in it; in preformatted text `always` adds a blank one."""
        if not self._preformatted:
            self._line_ended = self._line_ended or not self._in_blank_cell
        elif always or (self._line and not self._line[-1].endswith("\n")):
            self._line.append("\n")

    def take(self) -> list[str]:
        """Return the text since the last call as a list of one string, empty without text."""
        self._flush_line(preformatted=self._preformatted > 0)
        text, self._lines = "\n".join(self._lines), []
        self._cells = [0 for _ in self._cells]
        return [text] if text else []

    def _flush_line(self, preformatted: bool = False) -> None:
        line = "".join(self._line)
        self._line, self._line_ended = [], False
        if preformatted:
            line = line.translate(_APPEARANCE).strip("\r\n").rstrip()
        else:
            line = _WHITE_SPACE.sub(" ", line).translate(_APPEARANCE).strip()
        if line.strip():
            self._lines.append(line)


def _with_end_tag(element: re.Match[str]) -> str:
    name, attributes = element.groups()
    return element[0] if name.lower() in _VOID else f"<{name}{attributes}></{name}>"


def _check_cost(text: str) -> None:
    """Raise `UserError` if the parser would need too much; in time linear in the text."""
    steps = elements = depth = repeated = 0
    formatting: defaultdict[str, list[str]] = defaultdict(list)
    for token in _TOKEN.finditer(text):
        is_end, name = bool(token[3]), (token[1] or token[4] or "").lower()
        attributes = token[2] or token[5] or ""
        if not name:  # a comment
            continue
        if name in _FORMATTING:
            same = formatting[name]
            if is_end and same:
                same.pop()
                repeated -= 1
            elif not is_end and same.count(attributes) < 3:  # as in the standard
                same.append(attributes)
                repeated += 1
        elif name not in _VOID and name not in _CLOSED_BY_PARSER:
            depth = max(0, depth + (-1 if is_end else 1))
        elements += 1 + repeated
        steps += depth + max(len(attributes.split()), attributes.count('"') // 2) ** 2
        if elements > _MAX_ELEMENTS or steps > _MAX_PARSER_STEPS:
            raise UserError("has too many elements or too deep a nesting; split the page")
