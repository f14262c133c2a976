"""Detects faults: steps whose loss, gradient or layers are non-finite, or whose loss explodes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moma.errors import SharedError
from moma.train.recipe import StageConfig

# Weight of the newest loss in the exponential moving average of losses.
_EMA_WEIGHT = 0.02
_MAX_CONSECUTIVE_SKIPS = 10


class LossMonitor:
    """Checks each step's loss and gradient norm, which are the same on all ranks.

    Checks run on the device without synchronizing with the host.

    Attributes:
        skips: whether steps with a fault are skipped; see `StageConfig.on_fault`.
        first_fault: tensors on the device that describe the first fault: `fault_step`, 0 if there
            was none, `fault_loss`, `fault_norm`, and `fault_nonfinite`, the layers whose output
            or router logit was non-finite, [L].
    """

    def __init__(self, config: StageConfig, device: torch.device):
        self.skips = config.on_fault == "skip"
        self.skipped_steps = self._consecutive_skips = self._step = 0
        names = ("fault_step", "fault_loss", "fault_norm", "fault_nonfinite")
        self.first_fault = dict.fromkeys(names, torch.zeros((), device=device))
        self._explosion = config.explosion
        self._mean_loss = torch.full((), torch.nan, device=device)

    def begin_step(self, step: int) -> None:
        """Set the number of the next step, from 1."""
        self._step = step

    def check(self, loss: Tensor, norm: Tensor, nonfinite_L: Tensor) -> Tensor:
        """Whether a step is free of faults, as a boolean on the device.

        Args:
            loss: mean over all targets.
            norm: norm of the gradient.
            nonfinite_L: booleans, as in `ModelOutput`.
        """
        ok = loss.isfinite() & norm.isfinite() & ~nonfinite_L.any()
        if self._explosion:
            # Comparison with the initial NaN is false.
            ok = ok & ~(loss > self._explosion * self._mean_loss)
        mean = torch.lerp(self._mean_loss, loss, _EMA_WEIGHT)
        mean = torch.where(self._mean_loss.isnan(), loss, mean)
        self._mean_loss = torch.where(ok, mean, self._mean_loss)
        # Later faults may be consequences of the first one.
        is_first = (self.first_fault["fault_step"] == 0) & ~ok
        step = torch.full_like(loss, self._step)
        values = (step, loss, norm, nonfinite_L.to(loss.dtype))
        self.first_fault = {
            name: torch.where(is_first, value, self.first_fault[name])
            for name, value in zip(self.first_fault, values, strict=True)
        }
        return ok

    def should_skip(self, ok: Tensor) -> bool:
        """Whether to skip the step; raises `UserError` after too many consecutive skips."""
        if not self.skips:
            return False
        self._consecutive_skips = 0 if ok else self._consecutive_skips + 1
        self.skipped_steps += not ok
        if self._consecutive_skips == _MAX_CONSECUTIVE_SKIPS:
            raise SharedError(
                f"step {self._step}: {_MAX_CONSECUTIVE_SKIPS} consecutive steps were skipped: a "
                "loss or gradient was not finite, or the loss exploded; set on_fault=stop and use "
                "`moma replay`, look at the data, or lower the learning rate in a new run"
            )
        return not ok

    def get_state(self) -> dict[str, Any]:
        """State to save, JSON-serializable."""
        return {
            "mean_loss": None if self._mean_loss.isnan() else float(self._mean_loss),
            "skipped_steps": self.skipped_steps,
            "consecutive_skips": self._consecutive_skips,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `get_state`."""
        mean = state["mean_loss"]
        self._mean_loss.fill_(torch.nan if mean is None else mean)
        self.skipped_steps = state["skipped_steps"]
        self._consecutive_skips = state["consecutive_skips"]
