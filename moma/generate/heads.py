"""Logits of only the ids that the grammar allows: image codes inside images, text elsewhere."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moma.vocabulary import Vocabulary

# With more ranges of consecutive ids, their weights are copied into one matrix.
_MAX_RANGES = 4


class HeadRows:
    """The rows of a head's weight that belong to some ids.

    Args:
        ids: the ids, in the order of the logits.
        forbidden: those among them that are never allowed.
    """

    def __init__(self, weight_VD: Tensor, ids: np.ndarray, forbidden: Sequence[int] = ()):
        device = weight_VD.device
        self.ids_R = torch.from_numpy(ids)  # on the CPU
        on_device_R = self.ids_R.to(device)
        self.index_of_id_V = torch.full((len(weight_VD),), -1, device=device)
        self.index_of_id_V[on_device_R] = torch.arange(len(ids), device=device)
        self._forbidden = self.index_of_id_V[torch.tensor(forbidden, dtype=torch.int64)]
        breaks = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
        starts, ends = [0, *breaks], [*breaks, len(ids)]
        if len(starts) > _MAX_RANGES:
            self._parts = [weight_VD[on_device_R]]
        else:
            self._parts = [
                weight_VD[int(ids[start]) : int(ids[end - 1]) + 1]
                for start, end in zip(starts, ends, strict=True)
            ]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return fp32 logits of all ids, [T, R], computed in the dtype of the hidden vectors."""
        # Converted once: the dtype is always the same.
        self._parts = [part.to(hidden_TD.dtype) for part in self._parts]
        parts = [functional.linear(hidden_TD, part) for part in self._parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).float()

    def forbid(self, logits_TR: Tensor) -> None:
        """Set the logits of ids that are never allowed to −∞, in place."""
        if len(self._forbidden):
            logits_TR[:, self._forbidden] = -torch.inf


class DividedHead:
    """A model's head, divided into image codes and text."""

    def __init__(self, weight_VD: Tensor, vocabulary: Vocabulary):
        is_code = vocabulary.code_of_id >= 0
        never = (vocabulary.beginning, vocabulary.padding, vocabulary.end_image)
        self.codes = HeadRows(weight_VD, np.flatnonzero(is_code))
        self.text = HeadRows(weight_VD, np.flatnonzero(~is_code), never)
        self.begin_image = int(self.text.index_of_id_V[vocabulary.begin_image])
