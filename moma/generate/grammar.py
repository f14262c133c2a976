"""Grammar of mixed sequences: which token may follow, so that every image is complete.

An image is `begin_image`, exactly `codes_per_image` image codes, and `end_image`. Image codes are
allowed nowhere else, and nothing else is allowed inside an image (Chameleon's decoding).
"""

from typing import Literal, NamedTuple

from moma.vocabulary import Vocabulary

Mode = Literal["text", "image", "mixed"]


class AllowedIds(NamedTuple):
    """Which ids may come next.

    Attributes:
        codes: only image codes; otherwise only text.
        begin_image: whether an image may begin, if `codes` is false.
        forced: the only allowed id; None: there are several.
    """

    codes: bool = False
    begin_image: bool = False
    forced: int | None = None


class Grammar:
    """Tracks one sequence and determines which ids may come next.

    Args:
        mode: `text` generates only text, `image` only images, `mixed` text and images.
        images: number of images that `image` generates.
    """

    def __init__(self, vocabulary: Vocabulary, mode: Mode, images: int = 1):
        self.vocabulary, self.mode, self._images_left = vocabulary, mode, images
        self._codes_left: int | None = None

    @property
    def codes_left(self) -> int:
        """Number of codes that the current image still needs; 0 outside of images."""
        return self._codes_left or 0

    def advance(self, token: int) -> None:
        """Process the next token of the prompt or of its continuation."""
        if token == self.vocabulary.begin_image:
            self._codes_left = self.vocabulary.codes_per_image
        elif token == self.vocabulary.end_image:
            self._codes_left = None
        elif self._codes_left:
            self._codes_left -= 1

    def allowed(self, remaining: int | None = None) -> AllowedIds:
        """Return which ids may come next.

        Args:
            remaining: number of tokens that may still be generated; an image begins only if it
                fits; None: unlimited.
        """
        if self._codes_left:
            return AllowedIds(codes=True)
        if self._codes_left == 0:
            return AllowedIds(forced=self.vocabulary.end_image)
        if self.mode == "image":
            return AllowedIds(forced=self.vocabulary.begin_image)
        fits = remaining is None or remaining >= self.vocabulary.image_span
        return AllowedIds(begin_image=self.mode == "mixed" and fits)

    def ends_with(self, token: int) -> bool:
        """Whether the continuation is complete after `token`, to be called once for each token."""
        if self.mode != "image":
            return token == self.vocabulary.end
        if token != self.vocabulary.end_image:
            return False
        self._images_left -= 1
        return self._images_left <= 0
