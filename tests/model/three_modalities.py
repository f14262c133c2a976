"""A vocabulary with a third modality: the model supports any number."""

from functools import cached_property

import numpy as np

from moma.model.groups import GroupConfig
from moma.vocabulary import Vocabulary

NAMES, SHARES = ("text", "image", "audio"), (0.5, 0.25, 0.25)


class ThreeModalities(Vocabulary):
    """Ids 0–9 are text, 10–19 image, 20–29 audio."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return NAMES

    @cached_property
    def modality_of_id(self) -> np.ndarray:
        return np.arange(self.size) // 10


VOCABULARY = ThreeModalities(
    size=30,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(10, 20)),
    codes_per_image=4,
)


def group(names: str, experts: int) -> GroupConfig:
    return GroupConfig(modalities=tuple(names.split()), experts=experts)


GROUPS = [
    (group("text", 2), group("image", 3), group("audio", 1)),
    (group("text image audio", 4),),
    (group("text image audio", 1),),
    (group("text audio", 2), group("image", 2)),
    (group("text", 1), group("image audio", 2), group("text image audio", 1)),
    (group("text image", 2), group("image audio", 3), group("text image audio", 2)),
]
