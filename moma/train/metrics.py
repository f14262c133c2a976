"""Log records: means over the steps since the last record, copied from the device asynchronously.

every step:       sums of losses stay on the device
a logged step:    one reduction over ranks, and the start of one copy to the host
one step later:   the copy has arrived; the record is written without waiting (on a CPU, or if
                  faults are skipped, steps are waited for anyway: the record is written at once)
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moma.model.transformer import Transformer
from moma.runtime.peak import peak_flops, peak_memory
from moma.runtime.tracking import Record
from moma.runtime.world import World
from moma.train.recipe import Recipe
from moma.train.statistics import describe
from moma.vocabulary import IMAGE, TEXT

# Keys that depend on the clock and the machine; all others are the same whenever a run is repeated.
TIMING_KEYS = ("tokens_per_second", "mfu", "data_wait_fraction", "peak_memory", "seconds_left")


class HostCopy:
    """An asynchronous copy of several tensors to the host, as one transfer."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """Start the copy."""
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors.values()])
        on_gpu = flat.device.type == "cuda"
        self._host = torch.empty(flat.shape, pin_memory=on_gpu)
        self._host.copy_(flat, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> dict[str, Tensor]:
        """Wait for the copy and return the tensors."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = self._host.split([shape.numel() for shape in self._shapes.values()])
        shapes = self._shapes.items()
        return {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


class MetricsWindow:
    """Metrics of the steps since the last log record."""

    def __init__(self, recipe: Recipe, model: Transformer, flops_per_token: float, world: World):
        self._recipe, self._model, self._world = recipe, model, world
        self._flops_per_token = flops_per_token
        self._sums = torch.zeros(3, len(model.vocabulary.modalities), device=world.device)
        dtype = recipe.engine.compute_dtype(world.device)
        self._peak_flops = peak_flops(world.device, dtype) * world.size
        self._pending: tuple[HostCopy, Record, int, int, float] | None = None
        self.restart_clock()

    def add(self, sums: Tensor, tokens: int, data_wait: float) -> None:
        """Add a step.

        Args:
            sums: over all ranks, [3, M]; see `Step.__call__`.
            tokens: of all ranks.
            data_wait: seconds that this rank waited for data.
        """
        self._sums += sums
        self._steps += 1
        self._tokens += tokens
        self._data_wait += data_wait

    def restart_clock(self) -> None:
        """Exclude the time and the steps until now from the next record's throughput."""
        self._since = time.monotonic()
        self._steps, self._tokens, self._data_wait = 0, 0, 0.0

    def start_record(
        self, record: Record, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> None:
        """Start to copy the values of a record, which `finish_record` returns.

        Args:
            record: values that are known already, among them `step`.
            shared: tensors that are the same on all ranks.
            own: this rank's tensors, to be summed over ranks.
        """
        summed = dict(zip(own, self._world.sum_each([*own.values()]), strict=True))
        copy = HostCopy({"sums": self._sums, **shared, **summed})
        self._pending = copy, record, self._steps, self._tokens, self._data_wait
        self._sums = torch.zeros_like(self._sums)
        self._steps, self._tokens, self._data_wait = 0, 0, 0.0

    def finish_record(self) -> tuple[Record, dict[str, Tensor]] | None:
        """The record that was started, and its tensors on the host; None if there is none."""
        if self._pending is None:
            return None
        (copy, record, steps, tokens, data_wait), self._pending = self._pending, None
        tensors = copy.read()
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        speed = tokens / seconds
        loss_M, correct_M, targets_M = tensors["sums"].double()
        record |= {
            **mean_losses(loss_M, targets_M),
            "accuracy": _ratio(correct_M.sum(), targets_M.sum()),
            "gradient_norm": float(tensors["norm"]),
            **describe(tensors, self._model, self._recipe.trains_auxiliary_routers),
            "tokens_per_second": speed,
            "mfu": speed * self._flops_per_token / self._peak_flops,
            "data_wait_fraction": data_wait / seconds,
            "peak_memory": peak_memory(self._world.device),
            "seconds_left": (self._recipe.stage_config.steps - record["step"]) * seconds / steps,
        }
        return record, tensors

    def get_state(self) -> dict[str, Any]:
        """State to save, JSON-serializable: sums since the last record, without timings."""
        return {"sums": self._sums.tolist()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `get_state`."""
        self._sums.copy_(torch.tensor(state["sums"]))


def mean_losses(loss_M: Tensor, targets_M: Tensor) -> dict[str, float | None]:
    """Mean losses in nats per target, overall and by modality; None without a target.

    Args:
        loss_M, targets_M: sum of losses and number of targets by modality.
    """
    return {
        "loss": _ratio(loss_M.sum(), targets_M.sum()),
        "loss_text": _ratio(loss_M[TEXT], targets_M[TEXT]),
        "loss_image": _ratio(loss_M[IMAGE], targets_M[IMAGE]),
    }


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole else None
