"""Bytes of an HTML page → text, with charset labels meaning what they mean to a browser.

The order is that of the Encoding and HTML standards (https://encoding.spec.whatwg.org): byte-order
mark, then the declared charset, then a default. Bytes without a character become U+FFFD.
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
_MULTI_BYTE = frozenset({*_CODECS.values(), "iso2022_jp"} - {"cp1252"})
_MAX_UNDECODABLE = 0.25


def decode_html(data: bytes) -> str:
    """The text of a page.

    A page that is valid UTF-8 although a single-byte charset such as ISO-8859-1 is declared is
    read as UTF-8: such labels are left over from servers that overrode them.

    Raises:
        UserError: most of the bytes have no character in the charset, or no browser reads it.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _checked(data[len(mark) :].decode(encoding, "replace"), encoding)
    declared = _declared_encoding(data)
    if declared not in _MULTI_BYTE:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            declared = declared or _default_encoding(data)
    return _checked(data.decode(declared, "replace"), declared)


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


def _default_encoding(data: bytes) -> str:
    """UTF-8 where most of what is not ASCII is valid, else the Western default of browsers."""
    others = [character for character in data.decode("utf-8", "replace") if character > "\x7f"]
    return "utf-8" if others.count("\ufffd") * 2 < len(others) else "windows-1252"


def _checked(text: str, encoding: str) -> str:
    if text.count("\ufffd") > _MAX_UNDECODABLE * len(text):
        raise UserError(f"is not {encoding} text; save the page as UTF-8 or remove it")
    return text
