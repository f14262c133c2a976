"""Micro-batches of synthetic documents, packed like real ones.

Speed and memory depend on shapes and on the number of images and documents in a sequence, and
hardly on the ids.
"""

from collections.abc import Iterator
from itertools import count

import numpy as np

from moma.data.batches.budget import Budget
from moma.data.batches.packing import EncodedDocument, Packer
from moma.errors import UserError
from moma.train.recipe import Recipe
from moma.vocabulary import Vocabulary

_SPECIAL = 5
# Text tokens: mean of a document without images; range of a caption.
_MEAN_TEXT, _CAPTION = 400, (8, 32)


def synthetic_vocabulary(recipe: Recipe) -> Vocabulary:
    """Return a vocabulary of the sizes in a recipe, without a tokenizer.

    Raises:
        UserError: it is too small for the image codes.
    """
    codes = tuple(range(_SPECIAL, _SPECIAL + recipe.codec.codebook_size))
    sizes = recipe.text_tokenizer.vocabulary_size, recipe.codec.codes_per_image
    if sizes[0] <= _SPECIAL + len(codes):
        raise UserError(
            f"text_tokenizer.vocabulary_size = {sizes[0]} is too small for {len(codes)} image "
            "codes; raise it, or lower codec.codebook_size"
        )
    return Vocabulary(sizes[0], 0, 1, 2, 3, 4, codes, sizes[1])


def synthetic_batches(recipe: Recipe, vocabulary: Vocabulary, rank: int = 0) -> Packer:
    """Return a packer of endless micro-batches of captioned images and text.

    Raises:
        UserError: `image_share` is not a whole number of images.
    """
    data = recipe.data
    return Packer(
        data.micro_batch_size,
        data.sequence_length,
        Budget.from_config(data, vocabulary).images,
        vocabulary,
        _captioned(vocabulary, np.random.default_rng((recipe.seed, rank, 0))),
        _texts(vocabulary, np.random.default_rng((recipe.seed, rank, 1))),
    )


def _captioned(vocabulary: Vocabulary, random: np.random.Generator) -> Iterator[EncodedDocument]:
    codes = len(vocabulary.image_codes)
    for number in count():
        caption = _words(vocabulary, random, int(random.integers(*_CAPTION)))
        image = vocabulary.wrap_image(random.integers(0, codes, vocabulary.codes_per_image))
        ids = [vocabulary.beginning, *caption, *image, vocabulary.end]
        yield EncodedDocument("captions", number, np.array(ids, dtype=np.uint32))


def _texts(vocabulary: Vocabulary, random: np.random.Generator) -> Iterator[EncodedDocument]:
    for number in count():
        words = _words(vocabulary, random, 1 + int(random.exponential(_MEAN_TEXT)))
        ids = [vocabulary.beginning, *words, vocabulary.end]
        yield EncodedDocument("text", number, np.array(ids, dtype=np.uint32))


def _words(vocabulary: Vocabulary, random: np.random.Generator, length: int) -> list[int]:
    first = _SPECIAL + len(vocabulary.image_codes)
    return random.integers(first, vocabulary.size, length).tolist()
