"""Folders on disk: what `moma prepare` and `moma train` write.

DATA/                    RUN/
tokenizer.json           run.json           makes the folder a run: resolved recipe, checksums
vocabulary.json          recipe.toml        the resolved recipe for people and for `moma train`
codec/                   metrics.jsonl      one record per logged step
shards/SOURCE/           checkpoints/       step-00001000, …
                         tokenizer.json, vocabulary.json, codec/    copies
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moma.errors import UserError, json_error_message, shell_command
from moma.files import UNFINISHED, atomic_replace, atomic_write, checksum, read_json
from moma.recipe import AnyConfig, Config, check, recipe_value, to_toml

FORMAT = 1
_KIND = "moma run"
# Where the resolved recipe goes: the first name that is not taken by a file of the user's.
_RECIPE_NAMES = ("recipe.toml", "resolved.toml")
_RECIPE_HEADER = "# The resolved recipe of this run, written by moma; sha256 of the rest: "
# Files that people put into an experiment's folder before they train in it.
_NOTES = (".toml", ".md", ".txt", ".log", ".out", ".err", ".sh")
# Upper limit for the bytes of one record of a log.
_MAX_RECORD = 1 << 20


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers in a folder."""

    path: Path

    @property
    def text(self) -> Path:
        """The text tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def vocabulary(self) -> Path:
        """The vocabulary: which ids belong to which modality."""
        return self.path / "vocabulary.json"

    @property
    def codec(self) -> Path:
        """Folder of the image codec; absent if there is only text."""
        return self.path / "codec"

    def file_names(self) -> list[str]:
        """Paths of the existing files, relative to the folder; the vocabulary is last."""
        codec = sorted(path for path in self.codec.rglob("*") if path.is_file())
        files = [self.text, *codec, self.vocabulary]
        return [str(file.relative_to(self.path)) for file in files if file.is_file()]

    def copy_to(self, other: "Tokenizers") -> None:
        """Replace another folder's tokenizers by copies of these."""
        other.path.mkdir(parents=True, exist_ok=True)
        # Removed first and written last: a folder with a vocabulary has complete tokenizers.
        other.vocabulary.unlink(missing_ok=True)
        shutil.rmtree(other.codec, ignore_errors=True)
        atomic_replace(other.text, partial(shutil.copyfile, self.text))
        if self.codec.is_dir():
            atomic_replace(other.codec, partial(shutil.copytree, self.codec))
        atomic_replace(other.vocabulary, partial(shutil.copyfile, self.vocabulary))

    def _copy_files(self, other: "Tokenizers", names: Iterable[str]) -> None:
        for name in names:
            target = other.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_replace(target, partial(shutil.copyfile, self.path / name))


@dataclass(frozen=True)
class Run:
    """A run folder. Its manifest `run.json` makes a folder a run, no other file does."""

    path: Path

    @property
    def manifest(self) -> Path:
        """The manifest."""
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe as TOML: `recipe.toml`, unless the user has a file of that name."""
        paths = [self.path / name for name in _RECIPE_NAMES]
        ours = [path for path in paths if _is_resolved_recipe(path)]
        free = [path for path in paths if not path.exists()]
        return (ours or free or paths)[0]

    @property
    def metrics(self) -> Path:
        """The log of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizers(self) -> Tokenizers:
        """The run's own copies of the tokenizers."""
        return Tokenizers(self.path)

    @property
    def exists(self) -> bool:
        """Whether the folder has a run's manifest.

        Raises:
            UserError: the manifest is damaged or of another version.
        """
        return self.manifest.is_file() and self._read_manifest() is not None

    def require(self) -> "Run":
        """This run, if it is one.

        Raises:
            UserError: the path is missing, a file, or a folder without a run.
        """
        if self.exists:
            return self
        if self.path.is_dir():
            inside = sorted(path.parent for path in self.path.glob("*/run.json"))
            hint = f"{inside[0]} is one" if inside else "run `moma train`"
            raise UserError(f"{self.path}: not a run folder (no run.json); {hint}")
        if not self.path.exists():
            raise UserError(
                f"{self.path}: there is no such folder; name one that `moma train` wrote"
            )
        run = recipe_value(self.path, "run")
        hint = f"this recipe's run folder is {run}" if run else "name one that `moma train` wrote"
        raise UserError(f"{self.path}: is a file, not a run folder; {hint}")

    def require_free(self) -> None:
        """Check that a new run may use this folder.

        Raises:
            UserError: it holds files other than recipes, notes and logs of the user's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another folder with run=…")
        foreign = sorted(
            path.name
            for path in (self.path.iterdir() if self.path.exists() else ())
            if not path.name.startswith(".")
            and not (path.is_file() and path.suffix in _NOTES)
            and path.name != self.manifest.name + UNFINISHED
        )
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UserError(
                f"{self.path.resolve()}: not a run, but holds other files ({foreign[0]}{more}); "
                "choose a new folder with run=…"
            )
        if all(self._is_taken(name) for name in _RECIPE_NAMES):
            raise UserError(
                f"{self.path}: {' and '.join(_RECIPE_NAMES)} are not written by moma; rename one"
            )

    def create(self, recipe: Config, tokenizers: Tokenizers) -> None:
        """Write the manifest and the resolved recipe; this makes the folder a run.

        Args:
            recipe: the recipe.
            tokenizers: those that the run uses, for `copy_tokenizers` to compare with.
        """
        files = {name: checksum(tokenizers.path / name) for name in tokenizers.file_names()}
        values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        self._write_manifest({"recipe": values, "tokenizers": files})
        self._write_resolved(recipe)

    def update_recipe(self, recipe: Config) -> None:
        """Replace the recipe of an existing run, or its TOML file if it is missing."""
        values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        manifest = self._require_manifest()
        if manifest["recipe"] != values:
            self._write_manifest(manifest | {"recipe": values})
        self._write_resolved(recipe)

    def read_recipe(self, schema: type[AnyConfig]) -> AnyConfig:
        """The recipe of the run, from its manifest.

        Raises:
            UserError: the folder is not a run, or its recipe is not valid.
        """
        return check(schema, self._require_manifest()["recipe"], str(self.manifest))

    def copy_tokenizers(self, source: Tokenizers) -> None:
        """Copy the run's tokenizers from the prepared data, as far as they are missing.

        Raises:
            UserError: a copy has changed, or is missing and the source has other tokenizers.
        """
        expected = self._require_manifest()["tokenizers"]
        missing = []
        for name, entry in expected.items():
            if not (self.path / name).exists():
                missing.append(name)
            elif [*checksum(self.path / name)] != entry:
                raise UserError(
                    f"{self.path / name}: has changed since the run began; restore it, or delete "
                    f"it to have it copied from {source.path}"
                )
        for name in missing:
            file = source.path / name
            if not file.is_file() or [*checksum(file)] != expected[name]:
                raise UserError(
                    f"{self.path / name}: is missing, and {file} is not the file that the run "
                    "began with; restore either"
                )
        source._copy_files(self.tokenizers, missing)

    def require_tokenizers(self) -> Tokenizers:
        """The run's tokenizers, if all their files are there.

        Raises:
            UserError: one is missing.
        """
        manifest = self._require_manifest()
        for name in manifest["tokenizers"]:
            if not (self.path / name).is_file():
                command = shell_command("train", self.recipe)
                raise UserError(
                    f"{self.path / name}: is missing; `{command}` copies it from "
                    f"{manifest['recipe']['data']['path']} again"
                )
        return self.tokenizers

    def read_metrics(self) -> list[dict[str, Any]]:
        """The log's records, oldest first.

        Raises:
            UserError: there is no log, or a record is damaged.
        """
        return list(self.iter_metrics())

    def iter_metrics(self) -> Iterator[dict[str, Any]]:
        """Iterate over the log's records without holding all of them in memory.

        Raises:
            UserError: there is no log, or a record is damaged.
        """
        try:
            with self.metrics.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        return  # cut off while it was written
                    yield self._parse_record(line, f"record {number}")
        except OSError as error:
            raise UserError(f"{self.metrics}: cannot read ({error.strerror})") from error

    def last_metric(self) -> dict[str, Any] | None:
        """The last record, read from the log's end; None if there is none yet.

        Raises:
            UserError: it is damaged.
        """
        if not self.metrics.is_file():
            return None
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.metrics.stat().st_size - _MAX_RECORD))
            *lines, _ = file.read().split(b"\n")  # after the last line end, one is being written
        return self._parse_record(lines[-1], "last record") if lines else None

    def _parse_record(self, line: bytes, name: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"not JSON ({json_error_message(error)})"
            raise UserError(f"{self.metrics}, {name}: {message}") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{self.metrics}, {name}: not an object with a step number")
        return record

    def _read_manifest(self) -> dict[str, Any] | None:
        """The manifest; None if the file is somebody else's."""
        manifest = read_json(self.manifest)
        if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
            return None
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{self.manifest}: has format {manifest.get('format')}, this moma reads {FORMAT}; "
                "use the version that wrote it"
            )
        if not all(isinstance(manifest.get(key), dict) for key in ("recipe", "tokenizers")):
            raise UserError(f"{self.manifest}: damaged; restore it from a copy")
        return manifest

    def _require_manifest(self) -> dict[str, Any]:
        manifest = self.require()._read_manifest()
        assert manifest is not None
        return manifest

    def _write_manifest(self, values: dict[str, Any]) -> None:
        manifest = {"kind": _KIND, "format": FORMAT} | values
        atomic_write(self.manifest, json.dumps(manifest, indent=2) + "\n")

    def _write_resolved(self, recipe: Config) -> None:
        text = to_toml(recipe)
        content = f"{_RECIPE_HEADER}{_text_hash(text)}\n{text}"
        path = self.recipe
        if not path.is_file() or (_is_resolved_recipe(path) and path.read_text() != content):
            atomic_write(path, content)

    def _is_taken(self, name: str) -> bool:
        path = self.path / name
        return path.exists() and not _is_resolved_recipe(path)


def _is_resolved_recipe(path: Path) -> bool:
    """Whether a file is a resolved recipe that nobody has edited since."""
    try:
        header, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return False
    return header == _RECIPE_HEADER + _text_hash(text)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
