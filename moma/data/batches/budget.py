"""The image budget: how many images a micro-batch holds, and whether the documents can meet it.

The latter is checked before training starts. With T text tokens per image on average, k images
bring k · (T + span) tokens, where span is the number of tokens of an image, its two boundaries
included; if these are more than the B · S positions, text accumulates without end. Whether the
documents fit, and how much padding is left, is found by packing the first micro-batches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moma.data.batches.packing import Packer
from moma.data.config import DataConfig
from moma.errors import UserError
from moma.vocabulary import Vocabulary

# Micro-batches that are packed to check the budget, by default.
PACKED = 300


class ImageDocuments(NamedTuple):
    """The documents with images of one source.

    Attributes:
        weight: how often the source is drawn.
        tokens, images: of each document, integers of shape [documents].
    """

    weight: float
    tokens: np.ndarray
    images: np.ndarray


class Budget(NamedTuple):
    """The images of a micro-batch, and its size.

    Attributes:
        images: number of images (k).
        micro_batch_size, sequence_length: B and S.
        codes, span: tokens of an image, without and with its boundaries.
    """

    images: int
    micro_batch_size: int
    sequence_length: int
    codes: int
    span: int

    @classmethod
    def from_config(cls, config: DataConfig, vocabulary: Vocabulary) -> "Budget":
        """Return the images whose codes make up `image_share` of a micro-batch's positions.

        Raises:
            UserError: it is not a whole number (the message gives the nearest shares that are), or
                so many images do not fit.
        """
        sizes = config.micro_batch_size, config.sequence_length
        budget = cls(0, *sizes, vocabulary.codes_per_image, vocabulary.image_span)
        exact = config.image_share * budget.size / budget.codes
        images = round(exact)
        # A share such as 0.3333 stands for a third.
        if abs(exact - images) <= 1e-3 and images <= budget.max_images():
            return budget._replace(images=images)
        nearest = sorted({min(int(exact) + more, budget.max_images()) for more in (0, 1)})
        raise UserError(
            f"image_share {config.image_share:g} of {sizes[0]} sequences of {sizes[1]} is "
            f"{exact:.6g} images of {budget.codes} codes; choose "
            f"{' or '.join(map(budget.share, nearest))}, or another micro_batch_size and "
            f"sequence_length (a sequence holds at most {sizes[1] // budget.span} images)"
        )

    @property
    def size(self) -> int:
        """Positions of a micro-batch (B · S)."""
        return self.micro_batch_size * self.sequence_length

    def share(self, images: int) -> str:
        """Describe a number of images as `image_share`, for a message."""
        return f"{images * self.codes / self.size:.6g} ({images} images)"

    def max_images(self, text: float = 0.0) -> int:
        """Return the most images that fit, each with this many text tokens on average."""
        per_sequence = self.sequence_length // self.span
        return min(int(self.size / (text + self.span)), self.micro_batch_size * per_sequence)

    def describe(self, text: float, conjunction: str) -> str:
        """Describe the text per image and the positions for it, for a message.

        Args:
            text: text tokens per image that the documents have.
            conjunction: between both, such as `but `.
        """
        return (
            f"documents have {text:.6g} text tokens per image, {conjunction}{self.images} "
            f"images in {self.micro_batch_size} sequences of {self.sequence_length} leave room for "
            f"{self.size / self.images - self.span:.6g} per image"
        )


def check_documents(
    budget: Budget,
    with_images: Sequence[ImageDocuments],
    has_text: bool,
    names: str,
    world_size: int,
) -> float:
    """Refuse documents that cannot meet the image budget, in whatever order they are read.

    Args:
        with_images: the documents with images, for each source that has some.
        has_text: whether any source has documents without images.
        names: of the sources, for messages.
        world_size: ranks, each of which takes a micro-batch in a step.

    Returns:
        Text tokens per image, on average over the mixture; 0 without images.

    Raises:
        UserError: there are no images or too few, no text, or too much text per image.
    """
    if not budget.images and not has_text:
        raise UserError(
            f"image_share is 0, but every document of {names} has an image; "
            "add a source of text or raise image_share"
        )
    if not budget.images:
        return 0.0
    if not with_images:
        raise UserError(
            f"image_share is {budget.images * budget.codes / budget.size:g}, but no document "
            f"of {names} has an image; add a source of images or set image_share to 0"
        )
    found = sum(int(source.images.sum()) for source in with_images)
    needed = budget.images * world_size
    if found < needed:
        raise UserError(
            f"a step takes {budget.images} images for the micro-batch of each rank, {needed} in "
            f"all, but the training documents of {names} hold {found} in all, so that a step "
            "would repeat some; add images, or lower image_share or micro_batch_size"
        )
    tokens = sum(s.weight * (s.tokens - s.images * budget.span).mean() for s in with_images)
    text = float(tokens / sum(s.weight * s.images.mean() for s in with_images))
    if budget.images * (text + budget.span) > budget.size * (1 + 1e-9):
        most = budget.max_images(text)
        advice = f"lower image_share to {budget.share(most)}, " if most else ""
        raise UserError(
            f"{budget.describe(text, 'but ')}; {advice}raise sequence_length or shorten the texts "
            "of documents with images"
        )
    return text


def check_packing(
    budget: Budget, text: float, max_padding: float, packer: Packer, micro_batches: int = PACKED
) -> None:
    """Pack the first micro-batches, and refuse documents that do not fit or leave too much padding.

    Args:
        budget: what a micro-batch needs; at least one image.
        text: text tokens per image, from `check_documents`.
        max_padding: the largest share of the positions that may be padding.
        packer: at the first micro-batch; advanced by `micro_batches`.
        micro_batches: number to pack.

    Raises:
        UserError: text accumulates, or there is more padding.
    """
    empty = sum(packer.plan().padding for _ in range(micro_batches))
    padding = empty / (micro_batches * budget.size)
    if padding <= max_padding:
        return
    most = budget.max_images(text)
    least = 1 - most * (text + budget.span) / budget.size
    advice = f"raise image_share to {budget.share(most)}, which leaves {least:.2%} on average, "
    raise UserError(
        f"{budget.describe(text, '')}, and no document without images fills the rest: "
        f"{padding:.2%} of the positions of the first {micro_batches} micro-batches would be "
        f"padding, and data.max_padding allows {max_padding:.2%}; add a source of text, "
        f"{advice if most > budget.images else ''}choose another sequence_length, "
        "or raise data.max_padding"
    )
