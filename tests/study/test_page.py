"""The page is one file that loads nothing, and escapes all data."""

import base64
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from moma.study.page import Page, captioned, figure, grid, paragraph, table, tile
from moma.study.tables import Table, markdown, number

NASTY = "<script src='http://x/y.js'></script> & \"'<img onerror=1>"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def pixels_of(source):
    head, data = source.split(",")
    assert head == "data:image/png;base64"
    with Image.open(BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def image():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def page(tmp_path, image):
    plot = Figure()
    plot.subplots().plot([1, 2])
    page = Page(f"title {NASTY}", f"introduction {NASTY}")
    page.section(
        f"section {NASTY}",
        paragraph(f"paragraph {NASTY}"),
        table(Table("", "", (f"head {NASTY}", "b"), [(f"cell {NASTY}", 0.5)])),
        figure(plot),
        grid([captioned([tile(image, f"tile {NASTY}", "ok")], f"caption {NASTY}")]),
    )
    page.write(tmp_path / "deep" / "page.html")
    return (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page):
    reader = read(page)
    found = {tag for tag, _ in reader.tags}
    assert not found & {"script", "link", "iframe", "object", "embed", "base", "a"}
    assert len(reader.named("img")) == 2
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None and value.startswith("data:image/png;base64,")
    (style,) = (text for text in reader.text if "font-family" in text or ":root" in text)
    assert "url(" not in style and "@import" not in style


def test_markup_in_data_is_escaped(page):
    reader = read(page)
    text = "".join(reader.text)
    for part in ("title", "introduction", "section", "paragraph", "head", "cell", "caption"):
        assert f"{part} {NASTY}" in text
    (shown,) = (image for image in reader.named("img") if image.get("class") == "tile ok")
    assert shown["alt"] == shown["title"] == f"tile {NASTY}"


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00\r")))
def test_any_text_is_preserved_in_a_paragraph(text):
    reader = read(paragraph(text))
    assert "".join(reader.text) == text
    assert [tag for tag, _ in reader.tags] == ["p"]


def test_images_are_embedded_exactly(image):
    (shown,) = read(tile(image, "words")).named("img")
    assert (pixels_of(shown["src"]) == np.asarray(image)).all()


def test_a_plot_is_embedded():
    plot = Figure()
    plot.subplots().plot([1, 2])
    (image,) = read(figure(plot)).named("img")
    assert len(np.unique(pixels_of(image["src"]))) > 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.123456, "0.1235"), (12345.6, "1.235e+04"), (12345, "12345"), ("a", "a")],
)
def test_numbers_are_rounded(value, shown):
    assert number(value) == shown


def test_a_table_has_a_cell_for_each_value():
    reader = read(table(Table("", "", ("run", "loss"), [("a", 1.0), ("b", None)])))
    assert "".join(reader.text) == "runlossa1b–"
    assert len(reader.named("th")) == 2 and len(reader.named("td")) == 4


def test_a_failed_write_keeps_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    Page("old", "").write(path)
    Page("new", "").write(path)
    assert "new" in path.read_text(encoding="utf-8")
    assert {file.name for file in tmp_path.iterdir()} == {"page.html", ".moma-output.json"}
    broken = Page("broken", "")
    broken.section("section", "\ud800")
    with pytest.raises(UnicodeEncodeError):
        broken.write(path)
    assert "<title>new</title>" in path.read_text(encoding="utf-8")


def test_markdown_escapes_bars():
    table = Table("title", "explanation", ("name", "loss"), [("a|b", 0.5)])
    assert markdown(table) == "| name | loss |\n|---|---|\n| a\\|b | 0.5 |"
