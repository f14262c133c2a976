"""HTML pages: what is kept of them, and in which order."""

import pytest
from PIL import Image

from moma.data.documents import ImageRef, Rejected
from moma.data.sources.html import HtmlConfig
from moma.errors import UserError


def write(folder, pages, images=("a.png",), side=64):
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side + 1)).save(folder / name)
    for name, body in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = body if isinstance(body, bytes) else body.encode()
        (folder / name).write_bytes(data)
    return HtmlConfig(path=folder)


def parts_of(document):
    """Texts, and images as one-element lists of their file names."""
    return [
        part if isinstance(part, str) else [part.read.args[0].name] for part in document.segments
    ]


def walked(folder, body, **options):
    (document,) = write(folder, {"page.html": body}, **options).documents()
    return parts_of(document)


def test_a_page_is_walked_in_reading_order(tmp_path):
    body = """<!DOCTYPE html><html><head><title>t</title><style>p {}</style></head><body>
        <h1>The  <em>head</em>line</h1>
        <p>One <b>bold</b><!-- note --> word.<br>Next &amp; last</p>
        <figure><img src="a.png" alt="x"><figcaption>A caption</figcaption></figure>
        <ul><li>first<li>second</ul>tail
        <table><tr><td>1</td><td>2</td></tr></table>
        <pre>
  kept
    as it is</pre>
        <img src="./sub/../a.png?v=1#x"></body></html>"""
    assert walked(tmp_path, body) == [
        "The headline\nOne bold word.\nNext & last",
        ["a.png"],
        "A caption\nfirst\nsecond\ntail\n1 2\n  kept\n    as it is",
        ["a.png"],
    ]


@pytest.mark.parametrize(
    "dropped",
    [
        "<nav>no</nav>",
        "<footer>no</footer>",
        "<aside>no<p>no</p></aside>",
        "<header>no</header>",
        "<script>no</script>",
        '<div role="navigation">no</div>',
        '<div class="big navheader">no<img src="a.png"></div>',
        "<div hidden>no</div>",
        "<form>no<button>no</button></form>",
        "<svg><text>no</text></svg>",
        '<img src="">',
        "<img>",
        '<img src="https://a.example/a.png">',
        '<img src="//a.example/a.png">',
        '<img src="data:image/png;base64,AAAA">',
        '<img src="drawing.svg">',
        '<img src="http://[broken/a.png">',
    ],
)
def test_navigation_and_decoration_are_left_out(tmp_path, dropped):
    assert walked(tmp_path, f"<p>one{dropped}two</p><p>three</p>") in (
        ["onetwo\nthree"],
        ["one\ntwo\nthree"],
    )


def test_the_headline_of_an_article_stays(tmp_path):
    assert walked(tmp_path, "<article><header>yes</header>text</article>") == ["yes\ntext"]


def test_classes_to_leave_out_can_be_set(tmp_path):
    source = write(tmp_path, {"a.html": '<p class="x">a</p><p class="toc">b</p>'})
    (document,) = source.model_copy(update={"drop_classes": ("x",)}).documents()
    assert document.segments == ("b",)


def test_small_images_are_left_out_and_do_not_cut_the_text(tmp_path):
    assert walked(tmp_path, '<p>a <img src="a.png"> b</p>', side=63) == ["a b"]


def test_images_on_many_pages_are_left_out(tmp_path):
    shown = {
        n: '<img src="many.png">' * (n < 4) + '<img src="few.png">' * (n < 3) for n in range(150)
    }
    pages = {f"{n:03}.html": f"<p>{n}</p>{images}" for n, images in shown.items()}
    pages["once.html"] = '<p>x</p><img src="twice.png"><img src="twice.png">'
    source = write(tmp_path, pages, ["many.png", "few.png", "twice.png"])
    documents = {document.name: parts_of(document) for document in source.documents()}
    assert documents["000.html"] == ["0", ["few.png"]]
    assert documents["once.html"] == ["x", ["twice.png"], ["twice.png"]]


def test_an_image_of_few_pages_is_no_decoration(tmp_path):
    pages = {f"{n}.html": f'{n}<img src="{n}.png">' for n in range(3)}
    source = write(tmp_path, pages, [f"{n}.png" for n in range(3)])
    assert [parts_of(d) for d in source.documents()] == [[str(n), [f"{n}.png"]] for n in range(3)]


def test_paths_are_relative_to_the_page_or_the_folder(tmp_path):
    pages = {
        "sub/page.html": '<img src="in%20sub.png"><img src="../top.png"><img src="/top.png">',
        "other.htm": "<p>text</p>",
    }
    source = write(tmp_path, pages, ["sub/in sub.png", "top.png"])
    text, page = source.documents()
    assert [text.name, page.name] == ["other.htm", "sub/page.html"]
    assert parts_of(page) == [["in sub.png"], ["top.png"], ["top.png"]]


def test_a_page_whose_images_lie_outside_is_rejected(tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "secret.png")
    pages = {"a.html": '<img src="../secret.png">', "b.html": "good", "c.html": " <p></p>"}
    outside, good, empty = write(tmp_path / "pages", pages).documents()
    assert isinstance(outside, Rejected) and "is outside" in outside.reason
    assert outside.row == str(tmp_path / "pages/a.html")
    assert good.segments == ("good",)
    assert isinstance(empty, Rejected) and "no text and no image is left" in empty.reason


def test_a_missing_image_is_told_when_it_is_read(tmp_path):
    (document,) = write(tmp_path, {"a.html": 'x<img src="gone.png">'}).documents()
    assert isinstance(document.segments[1], ImageRef)
    with pytest.raises(UserError, match=r"a\.html: there is no .*gone\.png"):
        document.segments[1].read()


@pytest.mark.parametrize(
    "body",
    [
        "<p>käse</p>".encode(),
        b'<?xml version="1.0" encoding="UTF-8"?><html><body><p>k\xc3\xa4se</p></body></html>',
        b'<html><head><meta charset="iso-8859-1"></head><p>k\xe4se</p></html>',
    ],
)
def test_encodings_are_known(tmp_path, body):
    assert walked(tmp_path, body) == ["käse"]


def test_the_stamp_covers_pages_and_images(tmp_path):
    source = write(tmp_path, {"a.html": "a"})
    stamps = {source.fingerprint()}
    write(tmp_path, {"a.html": "ab"})
    stamps.add(source.fingerprint())
    write(tmp_path, {}, ["a.png"], side=90)
    stamps.add(source.fingerprint())
    assert len(stamps) == 3


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_pages_is_named(tmp_path, name):
    with pytest.raises(UserError, match="check the source's 'path'"):
        list(HtmlConfig(path=tmp_path / name).documents())


@pytest.mark.parametrize("depth", [300, 2000])
def test_deeply_nested_text_is_kept(tmp_path, depth):
    body = "<div>" * depth + "deep" + "</div>" * depth + "<p>after</p>"
    assert walked(tmp_path, body) == ["deep\nafter"]


def test_a_page_deeper_than_can_be_read_is_rejected(tmp_path):
    pages = {"a.html": "<p>before</p>" + "<div>" * 3000 + "deep", "b.html": "good"}
    deep, good = write(tmp_path, pages).documents()
    assert isinstance(deep, Rejected) and "Excessive depth in document: 2048" in deep.reason
    assert good.segments == ("good",)


@pytest.mark.parametrize(
    ("shown", "file"),
    [
        ('<img data-src="b.png">', "b.png"),
        ('<img src="data:image/gif;base64,AAAA" data-src="b.png">', "b.png"),
        ('<img src="gone.png" data-src="b.png">', "b.png"),
        ('<img src="a.png" data-src="b.png">', "a.png"),
        ('<img srcset="a.png 320w, b.png 640w">', "b.png"),
        ('<img srcset="a.png 1.5x,\n b.png">', "a.png"),
        ('<img srcset="https://a.example/big.png 2x, b.png 1x">', "b.png"),
        ('<img data-srcset="a.png, b.png">', "a.png"),
        ('<picture><source srcset="gone.webp"><source srcset="b.png 1x"><img></picture>', "b.png"),
        ('<picture><source srcset="b.png"><img src="a.png"></picture>', "a.png"),
        ('<img src="gone.png" srcset="gone2.png 9w">', "gone.png"),
        ('<img src="a.png" srcset="x y z , ,, b.png 1..2x">', "a.png"),
    ],
)
def test_images_that_are_loaded_late_are_found(tmp_path, shown, file):
    assert walked(tmp_path, f"<p>x</p>{shown}", images=("a.png", "b.png")) == ["x", [file]]
