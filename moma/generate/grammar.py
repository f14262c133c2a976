"""Grammar of mixed sequences: which token may follow, so that every image is complete.

An image is `begin_image`, exactly `codes_per_image` image codes, and `end_image`. Image codes are
allowed nowhere else, and nothing else is allowed inside an image (Chameleon's decoding).
"""

from typing import Literal

import numpy as np

from moma.vocabulary import IMAGE, Vocabulary

Mode = Literal["text", "image", "mixed"]


class Grammar:
    """Tracks one sequence and determines which ids may come next.

    Args:
        vocabulary: the ids.
        mode: `text` generates only text, `image` exactly one image, `mixed` text and images.
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
        """Process the next token of the prompt or of its continuation."""
        if token == self.vocabulary.begin_image:
            self._codes_left = self.vocabulary.codes_per_image
        elif token == self.vocabulary.end_image:
            self._codes_left = None
        elif self._codes_left:
            self._codes_left -= 1

    def allowed(self, remaining: int | None = None) -> np.ndarray:
        """Return a boolean mask [V] of the ids that may come next.

        Args:
            remaining: number of tokens that may still be generated; an image begins only if it
                fits; None: unlimited.
        """
        if self._codes_left:
            return self._inside
        if self._codes_left == 0:
            return self._only(self.vocabulary.end_image)
        if self.mode == "image":
            return self._only(self.vocabulary.begin_image)
        if remaining is not None and remaining < self.vocabulary.image_span:
            return self._outside & ~self._only(self.vocabulary.begin_image)
        return self._outside

    def ends_with(self, token: int) -> bool:
        """Whether the continuation is complete after `token`."""
        last = self.vocabulary.end_image if self.mode == "image" else self.vocabulary.end
        return token == last

    def _only(self, token: int) -> np.ndarray:
        return np.arange(self.vocabulary.size) == token
