"""Folders on disk: what `moma prepare` and `moma train` leave behind, and where.

DATA/                    RUN/
tokenizer.json           recipe.toml        every key, spelled out
vocabulary.json          metrics.jsonl      one object a logged step
codec/                   checkpoints/       step-00001000, …
shards/SOURCE/           tokenizer.json, vocabulary.json, codec/    copies
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moma.errors import UserError, json_error_message
from moma.files import atomic_replace
from moma.recipe import recipe_value

# Bytes that no row of a log exceeds.
_LONGEST_ROW = 1 << 20


@dataclass(frozen=True)
class Tokenizers:
    """Where a folder keeps its tokenizers."""

    path: Path

    @property
    def text(self) -> Path:
        """The text tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def vocabulary(self) -> Path:
        """Which id is what."""
        return self.path / "vocabulary.json"

    @property
    def codec(self) -> Path:
        """Folder of the image codec; missing where there is only text."""
        return self.path / "codec"

    def copy_to(self, other: "Tokenizers") -> None:
        """Copy the tokenizers, so that the other folder can be used alone."""
        other.path.mkdir(parents=True, exist_ok=True)
        # First away and last there: where a vocabulary is, the tokenizers are whole.
        other.vocabulary.unlink(missing_ok=True)
        atomic_replace(other.text, partial(shutil.copyfile, self.text))
        if self.codec.is_dir():  # text alone needs none
            shutil.rmtree(other.codec, ignore_errors=True)
            atomic_replace(other.codec, partial(shutil.copytree, self.codec))
        atomic_replace(other.vocabulary, partial(shutil.copyfile, self.vocabulary))


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """The log."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizers(self) -> Tokenizers:
        """The run's own copy of the tokenizers."""
        return Tokenizers(self.path)

    def require(self) -> "Run":
        """This run, if it is one.

        Raises:
            UserError: it is a folder without a run, a file, or not there.
        """
        if self.recipe.is_file():
            return self
        if self.path.is_dir():
            inside = sorted(path.parent for path in self.path.glob("*/recipe.toml"))
            hint = f"{inside[0]} is one" if inside else "run `moma train`"
            raise UserError(f"{self.path}: not a run folder (no recipe.toml); {hint}")
        if not self.path.exists():
            raise UserError(
                f"{self.path}: there is no such folder; name one that `moma train` wrote"
            )
        run = recipe_value(self.path, "run")
        hint = f"this recipe's is {run}" if run else "name one that `moma train` wrote"
        raise UserError(f"{self.path}: is a file, not a run folder; {hint}")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged steps, oldest first.

        Raises:
            UserError: there is no log, or a row of it is broken.
        """
        return list(self.each_metric())

    def each_metric(self) -> Iterator[dict[str, Any]]:
        """The same one by one, so that a long log need not lie in memory.

        Raises:
            UserError: there is no log, or a row of it is broken.
        """
        try:
            with self.metrics.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        return  # cut off while it was written
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        told = (
                            f"{self.metrics}, row {number}: not JSON ({json_error_message(error)})"
                        )
                        raise UserError(told) from error
        except OSError as error:
            raise UserError(f"{self.metrics}: cannot read ({error.strerror})") from error

    def last_metric(self) -> dict[str, Any] | None:
        """The last logged step, read from the log's end; None if there is none yet."""
        if not self.metrics.is_file():
            return None
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.metrics.stat().st_size - _LONGEST_ROW))
            *rows, _ = file.read().split(b"\n")  # after the last line end, one is being written
        return json.loads(rows[-1]) if rows else None
