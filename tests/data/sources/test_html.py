"""HTML pages: what is kept of them and in which order, their charset and their limits."""

import codecs

import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.sources.html import HtmlConfig
from moma.errors import UserError
from tests.factories import write_pages


def write(folder, pages, images=("a.png",), side=64):
    write_pages(folder, pages, images, side)
    return HtmlConfig(path=folder)


def parts_of(document):
    """Texts, and images as one-element lists of their file names."""
    return [
        part if isinstance(part, str) else [part.read.args[0].name] for part in document.segments
    ]


def parts_of_page(folder, body, **options):
    (document,) = write(folder, {"page.html": body}, **options).documents()
    return parts_of(document)


def test_a_page_is_read_in_reading_order(tmp_path):
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
    assert parts_of_page(tmp_path, body) == [
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
    assert parts_of_page(tmp_path, f"<p>one{dropped}two</p><p>three</p>") in (
        ["onetwo\nthree"],
        ["one\ntwo\nthree"],
    )


def test_the_headline_of_an_article_stays(tmp_path):
    assert parts_of_page(tmp_path, "<article><header>yes</header>text</article>") == ["yes\ntext"]


def test_classes_to_leave_out_can_be_set(tmp_path):
    source = write(tmp_path, {"a.html": '<p class="x">a</p><p class="toc">b</p>'})
    (document,) = source.model_copy(update={"drop_classes": ("x",)}).documents()
    assert document.segments == ("b",)


def test_small_images_are_left_out_and_do_not_cut_the_text(tmp_path):
    assert parts_of_page(tmp_path, '<p>a <img src="a.png"> b</p>', side=63) == ["a b"]


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


def test_an_image_on_one_of_few_pages_is_kept(tmp_path):
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


@pytest.mark.parametrize(
    ("page", "base", "image"),
    [
        ("in/page.html", "pictures/", "in/pictures/a.png"),
        ("in/page.html", "pictures/index.html?v#x", "in/pictures/a.png"),
        ("in/page.html", "../my%20own/", "my own/a.png"),
        ("in/page.html", "/my own/", "my own/a.png"),
        ("in/page.html", "%2Fmy own/", "my own/a.png"),
        ("in/page.html", "other.html", "in/a.png"),
        ("in/page.html", "", "in/a.png"),
        ("in/page.html", "https://a.example/pictures/", "in/a.png"),
        ("in/page.html", "http://[broken", "in/a.png"),
    ],
)
def test_paths_are_relative_to_the_base_of_a_page(tmp_path, page, base, image):
    body = f'<head><base target="_top"><base href="{base}"><base href="no/"></head>'
    places = ("in/a.png", "in/pictures/a.png", "my own/a.png", "pictures/a.png")
    source = write(tmp_path, {page: f'{body}<img src="a.png">'}, images=places)
    (document,) = source.documents()
    (shown,) = document.segments
    assert shown.read.args[0] == tmp_path / image


def test_a_base_outside_the_folder_is_rejected(tmp_path):
    page = '<base href="../../"><p>text <img src="a.png">'
    (rejected,) = write(tmp_path / "in", {"page.html": page}).documents()
    assert isinstance(rejected, Rejected) and "is outside" in rejected.reason


def test_a_page_with_images_outside_the_folder_is_rejected(tmp_path):
    Image.new("RGB", (80, 80)).save(tmp_path / "secret.png")
    pages = {"a.html": '<img src="../secret.png">', "b.html": "good", "c.html": " <p></p>"}
    outside, good, empty = write(tmp_path / "pages", pages).documents()
    assert isinstance(outside, Rejected) and "is outside" in outside.reason
    assert outside.row == str(tmp_path / "pages/a.html")
    assert good.segments == ("good",)
    assert isinstance(empty, Rejected) and "no text and no image is left" in empty.reason


def test_a_missing_image_is_reported_when_it_is_read(tmp_path):
    (document,) = write(tmp_path, {"a.html": 'x<img src="gone.png">'}).documents()
    assert isinstance(document.segments[1], ImageRef)
    with pytest.raises(UserError, match=r"a\.html: there is no .*gone\.png"):
        document.segments[1].read()


UTF8_PAGE = "<p>käse</p>".encode()


def declared(charset, data):
    return b"<meta charset='" + charset.encode() + b"'><p>first</p><p>" + data + b"</p><p>last</p>"


@pytest.mark.parametrize(
    "body",
    [
        UTF8_PAGE,
        codecs.BOM_UTF8 + b"<meta charset=koi8-r>" + UTF8_PAGE,
        codecs.BOM_UTF16_LE + UTF8_PAGE.decode().encode("utf-16-le"),
        codecs.BOM_UTF16_BE + UTF8_PAGE.decode().encode("utf-16-be"),
        b'<?xml version="1.0" encoding="UTF-8"?><html><body>' + UTF8_PAGE + b"</body></html>",
        b'<?xml version="1.0" encoding="iso-8859-1"?><html><body><p>k\xe4se</p></body></html>',
        b'<html><head><meta charset="iso-8859-1"></head><p>k\xe4se</p></html>',
        b"<META content='text/html; charset=latin1' http-equiv=Content-Type><p>k\xe4se",
        b"<!-- <meta charset=koi8-r> --><meta charset=l1><p>k\xe4se",
        b"<head><script>" + b"x" * 4000 + b"</script><meta charset=koi8-u></head>"
        b"<p>" + "кд".encode("koi8-u") + b"</p>",
        b"<p>k\xe4se</p>",
        b"<meta charset=unknown><p>k\xe4se</p>",
        b"<meta charset=utf-16>" + UTF8_PAGE,
        b"<meta charset=x-user-defined><p>k\xe4se</p>",
    ],
)
def test_the_charset_of_a_page_is_found(tmp_path, body):
    assert parts_of_page(tmp_path, body) in (["käse"], ["кд"])


@pytest.mark.parametrize(
    ("charset", "codec", "text"),
    [
        ("ISO-8859-1", "cp1252", "“smart” – 5 €"),
        ("ISO-8859-1", "cp1252", "Ã¤"),  # valid UTF-8, too
        ("us-ascii", "cp1252", "“smart” – 5 €"),
        ("ISO-8859-9", "cp1254", "“ığ”"),
        ("tis-620", "cp874", "“ไทย”"),
        ("gb2312", "gbk", "朱镕基"),
        ("x-gbk", "gb18030", "朱镕基"),
        ("shift_jis", "cp932", "①㈱漢"),
        ("euc-jp", "euc_jis_2004", "①漢字"),
        ("iso-2022-jp", "iso-2022-jp", "漢字"),
        ("ks_c_5601-1987", "cp949", "똠방"),
        ("big5", "big5hkscs", "漢字咗"),
        ("macintosh", "mac-roman", "ä†"),
    ],
)
def test_charset_labels_mean_what_they_mean_to_browsers(tmp_path, charset, codec, text):
    page = declared(charset, text.encode(codec))
    assert parts_of_page(tmp_path, page) == [f"first\n{text}\nlast"]


@pytest.mark.parametrize(
    ("charset", "data", "text"),
    [
        ("windows-1252", b"a \x81 b", "a � b"),
        ("utf-8", b"a \xff b", "a � b"),
        ("gb2312", b"a \x81", "a �"),
        ("shift_jis", b"a \x81", "a �"),
        ("euc-kr", b"a \xff b", "a � b"),
    ],
)
def test_bytes_without_a_character_become_replacement_characters(tmp_path, charset, data, text):
    assert parts_of_page(tmp_path, declared(charset, data)) == [f"first\n{text}\nlast"]


def test_one_damaged_byte_does_not_change_the_charset(tmp_path):
    page = "<p>Grüße aus Köln, überall</p>".encode() + b"<p>\xe4</p>"
    assert parts_of_page(tmp_path, page) == ["Grüße aus Köln, überall\n�"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<meta charset=iso-2022-kr><p>abc", "no browser reads its charset 'iso-2022-kr'"),
        (b"<meta charset=utf-8>" + bytes(range(128, 256)) * 4, "is not utf-8 text"),
        (b"", "no text and no image is left"),
    ],
)
def test_a_page_that_cannot_be_decoded_is_rejected(tmp_path, body, reason):
    (row,) = write(tmp_path, {"a.html": body}).documents()
    assert isinstance(row, Rejected) and reason in row.reason


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<center>a</center><center>b</center>", "a\nb"),
        ("<details><summary>a</summary>b</details>c", "a\nb\nc"),
        ("<fieldset><legend>a</legend>b</fieldset>", "a\nb"),
        ("<dl><dt>a<dd>b<dt>c</dl>", "a\nb\nc"),
        ("<ul><li>a<ul><li>b</ul>c</ul><dir><li>d</dir><menu><li>e</menu>", "a\nb\nc\nd\ne"),
        ("a<hr>b<hgroup><h1>c</h1>d</hgroup>", "a\nb\nc\nd"),
        ("<b>a<p>b</b>c</p>d", "a\nbc\nd"),
        ("<span>a<div>b</div></span>c", "a\nb\nc"),
        ("a<br><br>b<wbr>c", "a\nbc"),
        ("<p>a\n  <i>b </i> c</p>", "a b c"),
        ("a <!-- x --> b<em> c</em>d", "a b cd"),
        ("<table><caption>a</caption><tr><th>b<td>c<tr><td>d<td>e</table>f", "a\nb c\nd e\nf"),
        ("<table><tr><td><p>a</p></td><td><div>b</div></td></tr></table>", "a b"),
        ("<table><tr><td>a<p>b</p><td>c</table>", "a\nb\nc"),
        ("<table><tr><td></td><td>b</td></tr><tr><td>c</table>", "b\nc"),
        ("<table><tr><td><table><tr><td>a<tr><td>b</table><td>c</table>", "a\nb\nc"),
        ("a<pre>b<br>c\n<div>d</div>e</pre>f", "a\nb\nc\nd\ne\nf"),
        ("<pre>\n\n  a\tb  \n</pre>", "  a\tb"),
        ("<pre>a<script>b</script><span hidden>c</span> <b>d</b></pre>", "a d"),
        ("<xmp>a <b>c</xmp><listing>d\n e</listing>", "a <b>c\nd\n e"),
        ("5&nbsp;km<p>&nbsp;</p>", "5 km"),
        ("a&nbsp;&nbsp;b", "a  b"),
        ("a <q>b <q>c <q>d</q></q></q>, <q>e</q>", "a “b ‘c “d”’”, “e”"),
        ("<p>a</p><q>b<p>c</p></q><q>d</q>", "a\n“b\nc\n”“d”"),
        ("<pre><q>a\n b</q></pre>", "“a\n b”"),
        ("hy&shy;phen \ufeffmark", "hyphen mark"),
        ("日本\u3000語 a\u2009b", "日本\u3000語 a\u2009b"),
        ("a\0b &#150; &amp;lt; &unknown; &#xD800;", "ab – &lt; &unknown; \ufffd"),
        ("a<template>x</template><noscript><p>x</noscript><title>x</title>b", "ab"),
        ("a<style>x</style><object>x</object><video>x</video><canvas>x</canvas>b", "ab"),
        ("a<span style='color: red; DISPLAY : none'>x</span>b", "ab"),
        ("a<dialog>x</dialog><dialog open>b</dialog>", "a\nb"),
        ("<math>a<annotation>x</annotation></math>", "a"),
        ("<div>a<nav>x</nav>b</div>", "a\nb"),
        ("<nav><div>x</nav>a", "a"),
        ("<form><div>x</form>a", ""),
        ("<p hidden>x<div>a</div>b", "a\nb"),
        ("<li hidden>x<li>a", "a"),
        ("a<table>b<tr><td>c</table>", "ab\nc"),
        ("a<!-- x --!>b<!-->c", "abc"),
        ("a<iframe>x<p>x</iframe>b<p>1 < 2 <3</p>", "ab\n1 < 2 <3"),
    ],
)
def test_text_is_what_a_browser_shows(tmp_path, body, text):
    rows = write(tmp_path, {"a.html": body}).documents()
    assert [parts_of(row) for row in rows if isinstance(row, Document)] == [[text]] * bool(text)


def test_an_image_in_preformatted_text_or_a_cell_is_kept(tmp_path):
    body = '<pre>a\n <img src="a.png">\n b</pre><table><td>c<img src="a.png"><td>d</table>'
    assert parts_of_page(tmp_path, body) == ["a", ["a.png"], " b\nc", ["a.png"], "d"]


@pytest.mark.parametrize("name", ["a.xhtml", "a.html"])
def test_empty_elements_of_xhtml_do_not_hide_the_page(tmp_path, name):
    body = '<?xml version="1.0"?><html><head><title/><script src="a>b"/></head><body>'
    body += "<p>a<br/>b<span title='\"'/> c</p><textarea/>d</body></html>"
    (document,) = write(tmp_path, {name: body}).documents()
    assert parts_of(document) == ["a\nb c\nd"]


def test_the_fingerprint_covers_pages_and_images(tmp_path):
    source = write(tmp_path, {"a.html": "a"})
    fingerprints = {source.fingerprint()}
    write(tmp_path, {"a.html": "ab"})
    fingerprints.add(source.fingerprint())
    write(tmp_path, {}, ["a.png"], side=90)
    fingerprints.add(source.fingerprint())
    assert len(fingerprints) == 3


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_pages_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match="check the source's 'path'"):
        list(HtmlConfig(path=tmp_path / name).documents())


@pytest.mark.parametrize("depth", [300, 3000])
def test_deeply_nested_text_is_kept(tmp_path, depth):
    body = "<div>" * depth + "deep" + "</div>" * depth + "<p>after</p>"
    assert parts_of_page(tmp_path, body) == ["deep\nafter"]


@pytest.mark.parametrize(
    "body",
    [
        "<p>before</p>" + "<div>" * 200_000,
        "<span>" * 100_000 + "</x>" * 100_000,
        "<div " + " ".join(f"a{n}" for n in range(100_000)) + ">",
        "<body a=1" + '"b=" "' * 100_000 + ">",
        "".join(f"<p><font color={n}>" for n in range(10_000)),
    ],
    ids=["depth", "end tags", "attributes", "quotes", "formatting"],
)
def test_a_page_that_takes_too_long_to_parse_is_rejected(tmp_path, body):
    rejected, good = write(tmp_path, {"a.html": body, "b.html": "good"}).documents()
    assert isinstance(rejected, Rejected) and "split the page" in rejected.reason
    assert good.segments == ("good",)


@pytest.mark.parametrize(
    "body",
    [
        "<p>" + "text <b>bold</b> <a href=x>link " * 20_000,
        "<tr><td>cell<li>item<p>" * 20_000,
        "<script>" + "'<div>'" * 100_000 + "</script><!--" + "<div>" * 100_000 + "-->text",
        '<img srcset="' + "a,b " * 1_000 + "c" * 500_000 + ' d">text',
        "<header>x</header>" * 20_000 + "text",
        "<" * 1_000_000 + "<!--" * 100_000,
    ],
    ids=["inline", "implied ends", "script", "srcset", "headers", "unclosed"],
)
def test_a_long_page_is_read(tmp_path, body):
    (document,) = write(tmp_path, {"a.html": body}).documents()
    assert isinstance(document, Document)


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
def test_lazily_loaded_images_are_found(tmp_path, shown, file):
    assert parts_of_page(tmp_path, f"<p>x</p>{shown}", images=("a.png", "b.png")) == ["x", [file]]
