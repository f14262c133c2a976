"""Watches losses and gradients: not finite, or exploding. Judges on the device, without a wait."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moma.errors import SharedError
from moma.train.recipe import StageConfig

# Part of the loss's recent mean that a step replaces.
_EMA_DECAY = 0.02
# So many steps skipped one after the other are no accident.
_PATIENCE = 10


class LossMonitor:
    """Judges each step by its loss and the norm of its gradient, which all ranks share.

    Attributes:
        evidence: tensors on the device: `first`, the number of the first step at fault, 0 if there
            was none, and what was found in that step: `fault_loss`, `fault_norm`, and `nonfinite`,
            the layers whose output or router's score was not finite, [L].
        skipped: steps skipped so far.
    """

    def __init__(self, config: StageConfig, device: torch.device):
        self.skips = config.on_fault == "skip"
        self.skipped = self._in_a_row = 0
        nothing = torch.zeros((), device=device)
        self.evidence = dict.fromkeys(("first", "fault_loss", "fault_norm", "nonfinite"), nothing)
        self._explosion = config.explosion
        self._mean = torch.full((), torch.nan, device=device)
        self._step = 0

    def begin(self, step: int) -> None:
        """Name the step that comes, from 1."""
        self._step = step

    def judge(self, loss: Tensor, norm: Tensor, nonfinite_L: Tensor) -> Tensor:
        """Whether the step is sound: a boolean on the device.

        Args:
            loss: mean over all targets.
            norm: of the gradient.
            nonfinite_L: booleans, as in `ModelOutput`.
        """
        sound = loss.isfinite() & norm.isfinite() & ~nonfinite_L.any()
        if self._explosion:
            # Nothing is larger than the NaN that the mean is at first.
            sound = sound & ~(loss > self._explosion * self._mean)
        mean = torch.where(self._mean.isnan(), loss, torch.lerp(self._mean, loss, _EMA_DECAY))
        self._mean = torch.where(sound, mean, self._mean)
        # Whatever comes after the first fault may follow from it.
        at_fault = (self.evidence["first"] == 0) & ~sound
        step = torch.full_like(loss, self._step)
        found = zip(self.evidence, (step, loss, norm, nonfinite_L.to(loss.dtype)), strict=True)
        self.evidence = {
            name: torch.where(at_fault, value, self.evidence[name]) for name, value in found
        }
        return sound

    def refuses(self, sound: Tensor) -> bool:
        """Whether the step is to be skipped; waits for the device only if the recipe skips.

        Raises:
            UserError: too many steps were skipped one after the other.
        """
        if not self.skips:
            return False
        self._in_a_row = 0 if sound else self._in_a_row + 1
        self.skipped += not sound
        if self._in_a_row == _PATIENCE:
            raise SharedError(
                f"step {self._step}: {_PATIENCE} steps in a row were skipped, their loss or "
                "gradient not finite or exploding; set on_fault=stop and see `moma replay`, look "
                "at the data, or lower the learning rate in a new run"
            )
        return not sound

    def get_state(self) -> dict[str, Any]:
        """What it remembers; ready for JSON."""
        mean = float(self._mean)
        return {
            "mean": None if mean != mean else mean,
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another watch stood."""
        mean = state["mean"]
        self._mean.fill_(torch.nan if mean is None else mean)
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
