"""The folder of a codec's training: what is needed to resume it, and its log.

checkpoints/step-00000500/…   modules and optimizers
metrics.jsonl                 losses, and at times `CodecMetrics`
samples/step-00000500.png     images above their reconstructions
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from torch.optim import Optimizer

from moma.errors import UserError
from moma.files import atomic_replace
from moma.runs import Run
from moma.runtime.checkpoint import (
    load_checkpoint,
    newest_intact,
    read_state,
    set_aside,
    training_tensors,
)
from moma.runtime.tracking import MetricsLog, Record, Trackers
from moma.runtime.world import World, on_rank_0
from moma.runtime.writer import CheckpointWriter

logger = logging.getLogger(__name__)


class TrainingFolder:
    """Checkpoints, log and samples of one training; close it after use.

    Attributes:
        path: the folder.
        steps_done: step of the checkpoint that was restored; 0 without one.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        modules: nn.Module,
        optimizers: Callable[[int], tuple[Optimizer, ...]],
        world: World,
    ):
        """Open the folder, or create it, and restore the newest intact checkpoint.

        Args:
            config: what must be the same to resume, JSON-serializable.
            optimizers: returns those that have a state after a number of steps.

        Raises:
            UserError: all checkpoints are damaged, or were made with another configuration.
        """
        self.path, self._run, self._config, self._world = path, Run(path), config, world
        self._modules, self._optimizers = modules, optimizers
        self._writer = CheckpointWriter(self._run.checkpoints, world)
        on_rank_0(world, self._create)
        self.steps_done = self._restore()
        self._log = Trackers(MetricsLog(self._run, self.steps_done)) if world.rank == 0 else None

    def write(self, record: Record, samples: Image.Image | None = None) -> None:
        """Add a log record, and write the samples of its step; rank 0 only."""
        assert self._log is not None
        self._log.write(record)
        if samples is not None:
            file = self.path / "samples" / f"step-{record['step']:08d}.png"
            file.parent.mkdir(exist_ok=True)
            atomic_replace(file, partial(samples.save, format="PNG"))

    def save(self, step: int) -> None:
        """Start to write a checkpoint; the log is synced before.

        Raises:
            StorageError: the disk is full, or a record or the previous checkpoint was not written.
        """
        if self._log is not None:
            self._log.sync()
        tensors = training_tensors(self._modules, self._optimizers(step))
        self._writer.save(step, tensors, {"step": step, "config": self._config}, {})

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            StorageError: it could not be written.
        """
        self._writer.wait()

    def close(self) -> None:
        """End the background thread and close the log."""
        self._writer.close()
        if self._log is not None:
            self._log.close()

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._writer.remove_partial()

    def _restore(self) -> int:
        folder = self._run.checkpoints
        newest, damaged = newest_intact(folder, self._world)
        for path, message in damaged.items():
            if self._world.rank == 0:
                logger.warning("%s; resuming from %s", message, newest)
            on_rank_0(self._world, set_aside, path)
        if newest is None:
            return 0
        state = read_state(newest)
        if state.get("config") != self._config:
            raise UserError(
                f"{newest}: from training with another configuration, seed or set of images; "
                f"use the same, or delete {folder} to start over"
            )
        step: int = state["step"]
        load_checkpoint(newest, self._modules, self._optimizers(step), self._world)
        return step
