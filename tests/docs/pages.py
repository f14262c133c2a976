"""The documentation's pages, their links and their blocks of code."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
# A comment before a block says that a test runs it, or saves it as a file:
#   <!-- run -->, <!-- run: slow -->, <!-- save: some.toml pretrain.steps=2 -->
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
        page: the file.
        language: `bash`, `python`, `toml`, … or empty.
        text: the code.
        mark: the comment before it: what a test does with it; empty without one.
    """

    page: Path
    language: str
    text: str
    mark: str


def blocks(page: Path) -> list[Block]:
    """The blocks of code of a page, in order."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, b["language"], b["text"], b["mark"] or "") for b in found]


def shell_commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, split into words, without what is between `<<` and its end."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            while re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            yield words


def moma_arguments(words: list[str]) -> list[str] | None:
    """The arguments of a call of moma, also through `python -m` or `torchrun`; None for others."""
    for before, word in enumerate(words[1:]):
        if words[before] == "-m" and word == "moma":
            return words[before + 2 :]
    return words[1:] if words[0] == "moma" else None


def links(page: Path) -> list[str]:
    """The targets of the links and images of a page."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The names by which links refer to the headings of a page."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {re.sub(r"[\s\-]+", "-", title.strip()) for title in plain}
