"""Where rows of the log go: `metrics.jsonl` always, TensorBoard, Weights & Biases if asked for."""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from moma.errors import StorageError, UserError
from moma.files import atomic_write, sync_file
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
        """Go on after `step`; rows beyond it are dropped, they will be written anew.

        Raises:
            UserError: a row that is to stay is broken.
            StorageError: the disk is full, say.
        """
        self._path = run.metrics
        partial = run.metrics.with_suffix(".partial")
        with _on_disk(run.metrics):
            with partial.open("wb") as file:
                for row in _until(run, step):
                    file.write(json.dumps(row).encode() + b"\n")
                sync_file(file)
            partial.replace(run.metrics)
            self._file = run.metrics.open("ab")

    def write(self, row: Row) -> None:
        """Add a row, visible at once."""
        with _on_disk(self._path):
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Bring all rows to the disk: no checkpoint may be ahead of its log."""
        with _on_disk(self._path):
            sync_file(self._file)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a row that could not be written, and was told
            self._file.close()


class TensorBoard:
    """`RUN/tensorboard`: a scalar for each number of a row."""

    def __init__(self, run: Run, step: int):
        """Go on after `step`; later points of an interrupted run are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = run.path / "tensorboard"
        with _on_disk(self._path):
            self._writer = SummaryWriter(str(self._path), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Add the row's numbers."""
        with _on_disk(self._path):
            for key, value in numbers(row):
                self._writer.add_scalar(key, value, row["step"])

    def sync(self) -> None:
        """Hand all rows to the system."""
        with _on_disk(self._path):
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._writer.close()


class WandB:
    """A run of Weights & Biases that bears the folder's name; `RUN/wandb-id` tells which it is."""

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
        file = run.path / "wandb-id"
        if not file.is_file():
            atomic_write(file, uuid.uuid4().hex + "\n")
        self._run = wandb.init(
            project=project,
            name="/".join(run.path.resolve().parts[-2:]),
            id=file.read_text().strip(),
            resume="allow",
            dir=str(run.path),
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


@contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Let a full disk be told as one."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write ({error.strerror or error}); free some disk space, and the same "
            "command goes on from the last checkpoint"
        ) from error


def _until(run: Run, step: int) -> Iterator[Row]:
    """Rows up to a step: these came to the disk before its checkpoint, what follows may be torn."""
    if step and run.metrics.is_file():
        for row in run.each_metric():
            if row["step"] <= step:
                yield row
            if row["step"] >= step:
                return


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, those of nested objects named `outer/inner`."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)
