"""Trackers of metrics: `metrics.jsonl` always, TensorBoard and Weights & Biases if configured."""

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from moma.errors import StorageError, UserError
from moma.files import atomic_open, atomic_write, sync_file
from moma.recipe import Config
from moma.runs import Run

Record = dict[str, Any]


class TrackingConfig(Config):
    """Where metrics are shown besides `metrics.jsonl`.

    Attributes:
        tensorboard: whether `RUN/tensorboard` is written.
        wandb_project: project of Weights & Biases, for which the package `wandb` is needed; empty:
            none.
    """

    tensorboard: bool = True
    wandb_project: str = ""


class Tracker(Protocol):
    """Receives the records of a log and writes `path`; any method may raise `OSError`."""

    path: Path

    def write(self, record: Record) -> None:
        """Add a record."""

    def sync(self) -> None:
        """Bring all records to disk."""

    def close(self) -> None:
        """Close files and connections."""


class Trackers:
    """Several trackers as one.

    Attributes:
        error: of a record that could not be written; `sync` raises it, later records are dropped.
    """

    def __init__(self, *trackers: Tracker):
        self._trackers = trackers
        self.error: StorageError | None = None

    def write(self, record: Record) -> None:
        """Add a record."""
        try:
            for tracker in self._trackers if self.error is None else ():
                with _storage_errors(tracker.path):
                    tracker.write(record)
        except StorageError as error:
            self.error = error

    def sync(self) -> None:
        """Bring all records to disk; raises the error of an earlier record."""
        if self.error is not None:
            raise self.error
        for tracker in self._trackers:
            with _storage_errors(tracker.path):
                tracker.sync()

    def close(self) -> None:
        """Close files and connections."""
        for tracker in self._trackers:
            with suppress(OSError):  # of a record whose error was raised before
                tracker.close()


def make_trackers(config: TrackingConfig, run: Run, step: int) -> Trackers:
    """Create the configured trackers, which continue after `step`."""
    trackers: list[Tracker] = [MetricsLog(run, step)]
    if config.tensorboard:
        trackers.append(TensorBoard(run, step))
    if config.wandb_project:
        trackers.append(WandB(run, config.wandb_project))
    return Trackers(*trackers)


class MetricsLog:
    """`metrics.jsonl`: a JSON object per line, which other processes can read at once."""

    def __init__(self, run: Run, step: int):
        """Continue after `step`; later records are dropped, since their steps are repeated.

        Raises:
            UserError: a record up to `step` is damaged.
            StorageError: the file cannot be written.
        """
        self.path = run.metrics
        with atomic_open(self.path) as file:
            for record in _records_until(run, step):
                file.write(_line(record))
        self._file = self.path.open("ab")

    def write(self, record: Record) -> None:
        """Add a record."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Bring all records to disk."""
        sync_file(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """`RUN/tensorboard`: a scalar for each number in a record."""

    def __init__(self, run: Run, step: int):
        """Continue after `step`; later points of an interrupted run are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.path / "tensorboard"
        self._writer = SummaryWriter(str(self.path), purge_step=step + 1)
        self.sync, self.close = self._writer.flush, self._writer.close

    def write(self, record: Record) -> None:
        """Add the record's numbers."""
        for key, value in numbers(record):
            self._writer.add_scalar(key, value, record["step"])


class WandB:
    """A run of Weights & Biases with the folder's name; `RUN/wandb-id` holds its id."""

    def __init__(self, run: Run, project: str):
        """Start the run, or continue it.

        Raises:
            UserError: the package is missing, or `wandb-id` holds something else.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracking.wandb_project: the package 'wandb' is missing; pip install wandb, or "
                "remove the key"
            ) from error
        self.path = run.path / "wandb-id"
        if not self.path.is_file():
            atomic_write(self.path, uuid.uuid4().hex + "\n")
        name = self.path.read_text(errors="replace").strip()
        if not re.fullmatch("[0-9a-f]{32}", name):
            raise UserError(f"{self.path}: not an id written by moma; delete or rename it")
        folder = "/".join(run.path.resolve().parts[-2:])
        self._run = wandb.init(
            project=project, name=folder, id=name, resume="allow", dir=str(run.path)
        )
        self.close = self._run.finish

    def write(self, record: Record) -> None:
        """Add the record's numbers."""
        self._run.log(dict(numbers(record)), step=record["step"])

    def sync(self) -> None:
        """Do nothing: the package sends records by itself."""


def numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record; those of nested objects are named `outer/inner`."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Raise a `StorageError` in place of a system error."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write ({error.strerror or error}); check the disk, then run the same "
            "command to resume from the last checkpoint"
        ) from error


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _records_until(run: Run, step: int) -> Iterator[Record]:
    """Records up to a step; they were synced before its checkpoint, later ones may be torn."""
    if step and run.metrics.is_file():
        for record in run.iter_metrics():
            if record["step"] <= step:
                yield record
            if record["step"] >= step:
                return
