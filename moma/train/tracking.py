"""Where rows of the log go: `metrics.jsonl` always, TensorBoard, Weights & Biases if asked for."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from moma.errors import UserError
from moma.recipe import Config
from moma.runs import Run

Row = dict[str, Any]


class TrackingConfig(Config):
    """Where metrics are shown besides `metrics.jsonl`.

    Attributes:
        tensorboard: whether `RUN/tensorboard` is written.
        wandb_project: project of Weights & Biases, by its package `wandb`; empty: none.
    """

    tensorboard: bool = True
    wandb_project: str = ""


class Tracker(Protocol):
    """Takes rows."""

    def write(self, row: Row) -> None:
        """Add a row."""

    def sync(self) -> None:
        """Bring all rows to the disk."""

    def close(self) -> None:
        """Take no more rows."""


class JsonLines:
    """`metrics.jsonl`: a row a line."""

    def __init__(self, run: Run, step: int):
        """Go on after `step`; rows beyond it are dropped, they will be written anew."""
        rows = run.read_metrics() if run.metrics.is_file() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        partial = run.metrics.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(run.metrics)
        self._file = run.metrics.open("a")

    def write(self, row: Row) -> None:
        """Add a row, visible at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring all rows to the disk: no checkpoint may be ahead of its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """`RUN/tensorboard`: a scalar for each number of a row."""

    def __init__(self, run: Run, step: int):
        """Go on after `step`; later points of an interrupted run are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Add the row's numbers."""
        for key, value in numbers(row):
            self._writer.add_scalar(key, value, row["step"])

    def sync(self) -> None:
        """Hand all rows to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases that bears the folder's name."""

    def __init__(self, run: Run, project: str):
        """Begin it, or go on with it.

        Raises:
            UserError: the package is missing.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracking.wandb_project: the package 'wandb' is missing; pip install wandb, or "
                "leave the key out"
            ) from error
        name = run.path.resolve().name
        self._run = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(run.path)
        )

    def write(self, row: Row) -> None:
        """Add the row's numbers."""
        self._run.log(dict(numbers(row)), step=row["step"])

    def sync(self) -> None:
        """Nothing to do: it sends by itself."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def make_trackers(config: TrackingConfig, run: Run, step: int) -> list[Tracker]:
    """The trackers that a recipe asks for, going on after `step`."""
    trackers: list[Tracker] = [JsonLines(run, step)]
    if config.tensorboard:
        trackers.append(TensorBoard(run, step))
    if config.wandb_project:
        trackers.append(WandB(run, config.wandb_project))
    return trackers


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, those of nested objects named `outer/inner`."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)
