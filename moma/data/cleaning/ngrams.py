"""N-grams of words, by which texts are compared."""

import re
import sys
import unicodedata
from functools import cache
from itertools import islice

# Scripts without spaces between words: a character counts as a word. Thai, Lao, Myanmar, Khmer,
# Kana, Han.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"

_ASCII_WORD = re.compile(r"\w+", re.ASCII)


def ngrams(text: str, words: int) -> list[str]:
    """Return the n-grams of a text, in lower case and without punctuation.

    A text of fewer words is one n-gram; one without words has none.
    """
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())  # the same words, several times as fast
    else:
        found = _word_pattern().findall(unicodedata.normalize("NFC", text).lower())
    if len(found) <= words:
        return [" ".join(found)] if found else []
    shifted = (islice(found, first, None) for first in range(words))
    return [" ".join(ngram) for ngram in zip(*shifted, strict=False)]


@cache
def _word_pattern() -> re.Pattern[str]:
    """A word: letters and digits, and the marks that follow them, such as vowel signs."""
    characters = map(chr, range(sys.maxunicode + 1))
    marks = "".join(each for each in characters if unicodedata.category(each).startswith("M"))
    return re.compile(rf"[{_NO_SPACES}]|(?:[^\W{_NO_SPACES}][{marks}]*)+")
