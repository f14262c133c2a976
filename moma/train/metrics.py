"""Rows of the log: means since the last one, read from the device in one copy.

every step:    sums of losses stay on the device
a logged step: one reduction between ranks, one copy to the host, begun
a step later:  the copy is there; the row is written, and nobody waited
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moma.model.transformer import Transformer
from moma.runtime.peak import matmul_peak, peak_memory
from moma.runtime.tracking import Row
from moma.runtime.world import World
from moma.train.recipe import Recipe
from moma.train.statistics import describe
from moma.vocabulary import IMAGE, TEXT

# Columns that depend on the clock and the machine; all others are the same in every run.
TIMING = ("tokens_per_second", "mfu", "waiting_for_data", "peak_memory", "seconds_left")


class HostCopy:
    """Tensors on their way to the host, in one piece."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Begin the copy."""
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors.values()])
        on_gpu = flat.device.type == "cuda"
        self._host = torch.empty(flat.shape, pin_memory=on_gpu)
        self._host.copy_(flat, non_blocking=True)
        self._there = torch.cuda.Event() if on_gpu else None
        if self._there is not None:
            self._there.record()

    def read(self) -> dict[str, Tensor]:
        """Wait until the copy is there."""
        if self._there is not None:
            self._there.synchronize()
        parts = self._host.split([shape.numel() for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}


class Window:
    """The steps since the last row of the log."""

    def __init__(self, recipe: Recipe, model: Transformer, flops_per_token: float, world: World):
        self._model, self._world = model, world
        self._trains_routers = recipe.stage == "aux_router"
        self._steps_in_all = recipe.stage_config.steps
        self._flops_per_token = flops_per_token
        self._sums = torch.zeros(3, len(model.vocabulary.modalities), device=world.device)
        dtype = recipe.engine.compute_dtype(world.device)
        self._peak = matmul_peak(world.device, dtype) * world.size
        self.restart_clock()
        self._underway: tuple[HostCopy, Row, int, int, float] | None = None

    def add(self, sums: Tensor, tokens: int, waiting: float) -> None:
        """Add a step: its sums [3, M] over all ranks, its tokens, seconds of waiting for data."""
        self._sums += sums
        self._steps += 1
        self._tokens += tokens
        self._waiting += waiting

    def restart_clock(self) -> None:
        """Leave out of the next row's speed what was done until now."""
        self._since = time.monotonic()
        self._steps, self._tokens, self._waiting = 0, 0, 0.0

    def close_row(self, row: Row, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Begin to read a row; `finish_row` gives it.

        Args:
            row: what is known already, with `step`.
            shared: tensors that are the same on all ranks.
            own: this rank's tensors, which are added up over the ranks.
        """
        summed = own
        if own:
            shapes = [tensor.shape for tensor in own.values()]
            flat = self._world.sum(torch.cat([t.flatten().float() for t in own.values()]))
            parts = flat.split([shape.numel() for shape in shapes])
            summed = {
                name: part.view(shape) for name, part, shape in zip(own, parts, shapes, strict=True)
            }
        copy = HostCopy({"sums": self._sums, **shared, **summed})
        self._underway = copy, row, self._steps, self._tokens, self._waiting
        self._sums = torch.zeros_like(self._sums)
        self._steps, self._tokens, self._waiting = 0, 0, 0.0

    def finish_row(self) -> tuple[Row, dict[str, Tensor]] | None:
        """The row whose reading was begun, and the tensors beside it; None if there is none."""
        if self._underway is None:
            return None
        copy, row, steps, tokens, waiting = self._underway
        self._underway = None
        tensors = copy.read()
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        speed = tokens / seconds
        left = (self._steps_in_all - row["step"]) * seconds / steps
        row |= self._losses(tensors["sums"])
        row["gradient_norm"] = float(tensors["norm"])
        row |= describe(tensors, self._model, self._trains_routers)
        row |= {
            "tokens_per_second": speed,
            "mfu": speed * self._flops_per_token / self._peak,
            "waiting_for_data": waiting / seconds,
            "peak_memory": peak_memory(self._world.device),
            "seconds_left": left,
        }
        return row, tensors

    def get_state(self) -> dict[str, Any]:
        """The sums since the last row; ready for JSON. The clock's are a process's own."""
        return {"sums": self._sums.tolist()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where another window stood."""
        self._sums.copy_(torch.tensor(state["sums"]))

    @staticmethod
    def _losses(sums: Tensor) -> Row:
        loss_M, correct_M, targets_M = sums.double()
        total = targets_M.sum()
        return {
            "loss": _ratio(loss_M.sum(), total),
            "loss_text": _ratio(loss_M[TEXT], targets_M[TEXT]),
            "loss_image": _ratio(loss_M[IMAGE], targets_M[IMAGE]),
            "accuracy": _ratio(correct_M.sum(), total),
        }


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole else None
