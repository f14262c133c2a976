"""Bytes of an HTML page → text, with charset labels meaning what they mean to a browser.

The order is that of the Encoding and HTML standards (https://encoding.spec.whatwg.org): byte-order
mark, then the declared charset, then detection. Bytes without a character become U+FFFD.
"""

import codecs
import re

import webencodings

from moma.errors import UserError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Where a charset is declared; browsers look at least at the first 1,024 bytes.
_HEAD_BYTES = 2**14
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_DECLARATION = re.compile(
    rb"""<meta\b[^>]{0,999}?charset\s*=\s*["']?\s*([^\s"'>;/]{1,99})"""
    rb"""|^\s*<\?xml\b[^>]{0,99}?encoding\s*=\s*["']([^\s"'>]{1,99})""",
    re.IGNORECASE,
)
# Python's codecs where their names differ from the standard's, or where they lack characters.
# A page whose label could be read as ASCII is not UTF-16.
_CODECS = {
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc-jp": "euc_jis_2004",
    "euc-kr": "cp949",
    "utf-16le": "utf-8",
    "utf-16be": "utf-8",
    "x-user-defined": "cp1252",
}
_MAX_UNDECODABLE = 0.25


def decode_html(data: bytes) -> str:
    """Return the text of a page.

    Raises:
        UserError: most of the bytes have no character in the charset, or no browser reads it.
    """
    marks = ((mark, name) for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark))
    mark, encoding = next(marks, (b"", ""))
    encoding = encoding or _declared_encoding(data) or _detect_encoding(data)
    text = data[len(mark) :].decode(encoding, "replace")
    if text.count("\ufffd") > _MAX_UNDECODABLE * len(text):
        raise UserError(f"is not {encoding} text; save the page as UTF-8 or remove it")
    return text


def _declared_encoding(data: bytes) -> str | None:
    """Python's name of the codec; None where no known charset is declared."""
    declaration = _DECLARATION.search(_COMMENT.sub(b"", data[:_HEAD_BYTES]))
    if declaration is None:
        return None
    label = (declaration[1] or declaration[2]).decode("ascii", "replace")
    found = webencodings.lookup(label)
    if found is None:
        return None
    if found.name == "replacement":
        raise UserError(f"no browser reads its charset '{label}'; save the page as UTF-8")
    return _CODECS.get(found.name) or found.codec_info.name


def _detect_encoding(data: bytes) -> str:
    """UTF-8 where most of what is not ASCII is valid, else the Western default of browsers."""
    text = data.decode("utf-8", "replace")
    not_ascii = len(text) - len(text.encode("ascii", "ignore"))
    is_utf8 = not not_ascii or text.count("\ufffd") * 2 < not_ascii
    return "utf-8" if is_utf8 else "windows-1252"
