"""What may follow what in a mixed sequence: text anywhere, images whole and closed.

An image is its opening boundary, exactly as many codes as the codec gives, and its closing
boundary; in between nothing else is allowed, outside of it no code is (Chameleon's decoding).
"""

from typing import Literal

import numpy as np

from moma.vocabulary import IMAGE, Vocabulary

Mode = Literal["text", "image", "mixed"]


class Grammar:
    """Follows one sequence and tells which ids may come next.

    Args:
        vocabulary: the ids.
        mode: `text` writes text alone; `image` writes one image and ends; `mixed` does both.
    """

    def __init__(self, vocabulary: Vocabulary, mode: Mode):
        self.vocabulary, self.mode = vocabulary, mode
        self._codes_left: int | None = None
        is_code = vocabulary.modality_of_id == IMAGE
        outside = ~is_code
        outside[[vocabulary.beginning, vocabulary.padding, vocabulary.end_image]] = False
        outside[vocabulary.begin_image] = mode == "mixed"
        self._inside, self._outside = is_code, outside

    def advance(self, token: int) -> None:
        """Take note of a token of the prompt or of the answer."""
        if token == self.vocabulary.begin_image:
            self._codes_left = self.vocabulary.codes_per_image
        elif token == self.vocabulary.end_image:
            self._codes_left = None
        elif self._codes_left:
            self._codes_left -= 1

    def allowed(self, room: int | None = None) -> np.ndarray:
        """Booleans [V]: the ids that may come next.

        Args:
            room: how many more tokens may be written; an image is opened only if it fits.
        """
        if self._codes_left:
            return self._inside
        if self._codes_left == 0:
            return self._only(self.vocabulary.end_image)
        if self.mode == "image":
            return self._only(self.vocabulary.begin_image)
        if room is not None and room < self.vocabulary.image_span:
            return self._outside & ~self._only(self.vocabulary.begin_image)
        return self._outside

    def ends_with(self, token: int) -> bool:
        """Whether the answer is complete once `token` has been written."""
        last = self.vocabulary.end_image if self.mode == "image" else self.vocabulary.end
        return token == last

    def _only(self, token: int) -> np.ndarray:
        return np.arange(self.vocabulary.size) == token
