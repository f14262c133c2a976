"""The vocabulary of text and image tokens: the only module that maps ids to modalities.

An image in a sequence is `begin_image`, its codes in row-major order, and `end_image`; these two
boundary ids count as text (MoMa §2.1).
"""

import json
from dataclasses import dataclass, fields
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moma.errors import UserError, error_reason
from moma.files import atomic_write, fingerprint, read_bounded

ModalityName = Literal["text", "image"]
MODALITIES: tuple[ModalityName, ...] = ("text", "image")
TEXT, IMAGE = range(len(MODALITIES))
MAX_SIZE = 2**24
"""Largest vocabulary: tables of all ids are held in memory."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a mixed-modal model.

    Attributes:
        size: number of ids V, image codes included.
        beginning, end, padding: ids that begin and end a document, and that pad a sequence.
        begin_image, end_image: ids around an image (Chameleon's BOI and EOI).
        image_codes: id of each codebook entry of the codec, in codebook order.
        codes_per_image: number of codes of an image.
    """

    size: int
    beginning: int
    end: int
    padding: int
    begin_image: int
    end_image: int
    image_codes: tuple[int, ...]
    codes_per_image: int

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range, or an id has two meanings.
            TypeError: one is not an integer.
        """
        ids = {*map(index, (*self.special, *self.image_codes))}
        if len(ids) < len(self.special) + len(self.image_codes):
            raise ValueError("an id has two meanings")
        if not 0 <= min(ids) <= max(ids) < index(self.size) <= MAX_SIZE:
            raise ValueError(f"ids must be at least 0 and less than size, and size ≤ {MAX_SIZE}")
        if not 1 <= index(self.codes_per_image) <= MAX_SIZE:
            raise ValueError(f"codes_per_image must be from 1 to {MAX_SIZE}")

    @property
    def special(self) -> tuple[int, int, int, int, int]:
        """The ids that are neither text nor image codes, in the order of the attributes."""
        return self.beginning, self.end, self.padding, self.begin_image, self.end_image

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities; a subclass may add some."""
        return MODALITIES

    @cached_property
    def modality_of_id(self) -> np.ndarray:
        """Modality of each id, int64 of shape [V], as an index into `modalities`."""
        table = np.full(self.size, TEXT, dtype=np.int64)
        table[list(self.image_codes)] = IMAGE
        return table

    @cached_property
    def code_of_id(self) -> np.ndarray:
        """Codebook index of each id, int64 of shape [V]; −1 for other ids."""
        table = np.full(self.size, -1, dtype=np.int64)
        table[list(self.image_codes)] = np.arange(len(self.image_codes))
        return table

    @property
    def image_span(self) -> int:
        """Number of tokens of an image in a sequence, its boundaries included."""
        return self.codes_per_image + 2

    @cached_property
    def fingerprint(self) -> str:
        """Short hash that identifies the vocabulary in shards and checkpoints."""
        return fingerprint(json.dumps(self.to_dict()).encode())

    def wrap_image(self, codes: np.ndarray) -> list[int]:
        """Return the ids of an image in a sequence from its codebook indices [codes_per_image]."""
        ids = np.asarray(self.image_codes)[codes.reshape(-1)]
        return [self.begin_image, *ids.tolist(), self.end_image]

    def differences(self, other: "Vocabulary") -> str:
        """Describe the fields in which two vocabularies differ; empty if they are equal."""
        pairs = {key: (mine, other.to_dict()[key]) for key, mine in self.to_dict().items()}
        return ", ".join(
            f"{key} ({len(a)} and {len(b)} ids)" if key == "image_codes" else f"{key} ({a} and {b})"
            for key, (a, b) in pairs.items()
            if a != b
        )

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        atomic_write(path, json.dumps(self.to_dict()) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        # `asdict` would copy each of the image codes.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read a vocabulary written by `save`.

        Raises:
            UserError: the file is missing or not a vocabulary.
        """
        try:
            fields = json.loads(read_bounded(path))
            return cls(**{**fields, "image_codes": tuple(fields["image_codes"])})
        except FileNotFoundError as error:
            raise UserError(f"{path.parent}: not prepared yet; run `moma prepare`") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: not a vocabulary ({error_reason(error)}); run `moma prepare`"
            ) from error
