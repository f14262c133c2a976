"""Folders on disk: what `moma prepare` and `moma train` write.

DATA/                    RUN/
tokenizer.json           run.json           makes the folder a run: resolved recipe, checksums
vocabulary.json          recipe.toml        the resolved recipe as TOML, for users and `moma train`
codec/                   metrics.jsonl      one record per logged step
shards/SOURCE/           checkpoints/       step-00001000, …
                         tokenizer.json, vocabulary.json, codec/    copies
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moma.errors import UserError, json_error_message, shell_command
from moma.files import (
    UNFINISHED,
    atomic_replace,
    atomic_write,
    checksum,
    fingerprint,
    open_regular,
    read_bounded,
    read_json,
)
from moma.recipe import AnyConfig, Config, check, recipe_value, to_toml

FORMAT = 1
_KIND = "moma run"
_MANIFESTS = {"run": "run.json", "data": "provenance.json"}
# Where the resolved recipe goes: the first name that is not taken by a file of the user's.
_RECIPE_NAMES = ("recipe.toml", "resolved.toml")
_RECIPE_HEADER = "# The resolved recipe of this run, written by moma; sha256 of the rest: "
# Files that users put into an experiment's folder before they train in it.
_NOTES = (".toml", ".md", ".txt", ".log", ".out", ".err", ".sh")


def wrong_folder(path: Path, wanted: Literal["run", "data"]) -> UserError:
    """The error for a path that is not a run folder or a data folder; it describes what it is."""
    other: Literal["run", "data"] = "data" if wanted == "run" else "run"
    verb, keys = ("train", ("run",)) if wanted == "run" else ("prepare", ("data", "path"))
    hint = f"name one that `moma {verb}` wrote"
    if not path.exists():
        return UserError(f"{path}: there is no such folder; {hint}")
    if not path.is_dir():
        if value := recipe_value(path, *keys):
            hint = f"this recipe's {wanted} folder is {value}"
        return UserError(f"{path}: is a file, not a {wanted} folder; {hint}")
    if (path / _MANIFESTS[other]).is_file():
        if wanted == "data" and Run(path).exists:
            hint = f"its data folder is {Run(path).read_manifest()['recipe']['data']['path']}"
        return UserError(f"{path}: is a {other} folder, not a {wanted} folder; {hint}")
    near = [*sorted(path.glob("*/")), *path.absolute().parents[:2]]
    if found := [folder for folder in near if (folder / _MANIFESTS[wanted]).is_file()]:
        hint = f"{found[0]} is one"
    what = "holds tokenizers and is " if (path / "tokenizer.json").is_file() else ""
    return UserError(f"{path}: {what}not a {wanted} folder (no {_MANIFESTS[wanted]}); {hint}")


class Tokenizers:
    """The tokenizers in a folder: `text`, `vocabulary`, and `codec` unless there is only text."""

    def __init__(self, path: Path):
        self.path = path
        self.text = path / "tokenizer.json"
        self.vocabulary = path / "vocabulary.json"
        self.codec = path / "codec"

    def require(self) -> "Tokenizers":
        """These tokenizers; raises `UserError` if the folder has none."""
        if not self.text.is_file() and not self.codec.is_dir():
            raise UserError(
                f"{self.path}: there are no tokenizers; name a run, prepared data or a folder that "
                "`moma tokenizer` wrote"
            )
        return self

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


class Run:
    """A run folder. Its manifest `run.json` makes a folder a run, no other file does."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest = path / _MANIFESTS["run"]
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tokenizers = Tokenizers(path)

    @property
    def recipe(self) -> Path:
        """The resolved recipe as TOML: `recipe.toml`, unless the user has a file of that name."""
        paths = [self.path / name for name in _RECIPE_NAMES]
        written = [path for path in paths if _is_resolved_recipe(path)]
        free = [path for path in paths if not path.exists()]
        return (written or free or paths)[0]

    def read_manifest(self) -> dict[str, Any]:
        """The manifest of the run; raises `UserError` if the folder is not a run."""
        manifest = self._find_manifest()
        if manifest is None:
            raise wrong_folder(self.path, "run")
        return manifest

    @property
    def exists(self) -> bool:
        """Whether the folder has a run's manifest; raises `UserError` if that is damaged."""
        return self._find_manifest() is not None

    def require(self) -> "Run":
        """This run; raises `UserError` if the path is missing, a file, or another folder."""
        self.read_manifest()
        return self

    def require_free(self) -> None:
        """Raise `UserError` if a new run may not use this folder, because of other files in it."""
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
        if self.recipe.exists() and not _is_resolved_recipe(self.recipe):
            raise UserError(
                f"{self.path}: {' and '.join(_RECIPE_NAMES)} are not written by moma; rename one"
            )

    def create(
        self, recipe: Config, tokenizers: Tokenizers, shards: Mapping[str, Config] | None = None
    ) -> None:
        """Write the manifest, with checksums of the tokenizers in use, and the resolved recipe.

        Args:
            shards: of each source, which shards at an address the run trains on.
        """
        files = {name: checksum(tokenizers.path / name) for name in tokenizers.file_names()}
        found = {name: config.model_dump(mode="json") for name, config in (shards or {}).items()}
        own = {"shards": found} if found else {}
        self._write(recipe, {"kind": _KIND, "format": FORMAT, "tokenizers": files, **own})

    def update_recipe(self, recipe: Config) -> None:
        """Replace the recipe of an existing run, or its TOML file if it is missing."""
        self._write(recipe, self.read_manifest())

    def read_recipe(self, schema: type[AnyConfig]) -> AnyConfig:
        """The recipe of the run, from its manifest.

        Raises:
            UserError: the folder is not a run, or its recipe is not valid.
        """
        return check(schema, self.read_manifest()["recipe"], str(self.manifest))

    def copy_tokenizers(self, source: Tokenizers) -> None:
        """Copy those of the run's tokenizers that it lacks from the prepared data.

        Raises:
            UserError: a copy has changed, or is missing and the source has other tokenizers.
        """
        missing = []
        for name, expected in self.read_manifest()["tokenizers"].items():
            copy, file = self.path / name, source.path / name
            if copy.exists() and [*checksum(copy)] != expected:
                raise UserError(
                    f"{copy}: has changed since the run began; restore it, or delete it to have it "
                    f"copied from {source.path}"
                )
            if not copy.exists() and not (file.is_file() and [*checksum(file)] == expected):
                raise UserError(
                    f"{copy}: is missing, and {file} is not the file that the run began with; "
                    "restore either"
                )
            if not copy.exists():
                missing.append((file, copy))
        for file, copy in missing:
            copy.parent.mkdir(parents=True, exist_ok=True)
            atomic_replace(copy, partial(shutil.copyfile, file))

    def require_tokenizers(self) -> Tokenizers:
        """The run's tokenizers; raises `UserError` if a file is missing."""
        manifest = self.read_manifest()
        for name in manifest["tokenizers"]:
            if not (self.path / name).is_file():
                command = shell_command("train", self.recipe)
                raise UserError(
                    f"{self.path / name}: is missing; `{command}` copies it from "
                    f"{manifest['recipe']['data']['path']} again"
                )
        return self.tokenizers

    def iter_metrics(self) -> Iterator[dict[str, Any]]:
        """Iterate over the log's records, oldest first; raises `UserError` if one is damaged."""
        try:
            with open_regular(self.metrics) as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        return  # cut off while it was written
                    yield _parse_record(line, f"{self.metrics}, record {number}")
        except OSError as error:
            message = f"{self.metrics}: cannot read ({error.strerror}); restore it from a copy"
            raise UserError(message) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The log's records; see `iter_metrics`.

        Raises:
            UserError: there is no log, or a record is damaged.
        """
        return list(self.iter_metrics())

    def last_metric(self) -> dict[str, Any] | None:
        """The log's last record; None if there is none yet.

        Raises:
            UserError: it is damaged.
        """
        records = self.read_metrics() if self.metrics.is_file() else []
        return records[-1] if records else None

    def _find_manifest(self) -> dict[str, Any] | None:
        """The manifest; None if there is none, or the file was not written by moma."""
        manifest = read_json(self.manifest) if self.manifest.is_file() else None
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

    def _write(self, recipe: Config, manifest: dict[str, Any]) -> None:
        values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        if manifest.get("recipe") != values:
            text = json.dumps(manifest | {"recipe": values}, indent=2)
            atomic_write(self.manifest, text + "\n")
        toml, path = to_toml(recipe), self.recipe
        content = f"{_RECIPE_HEADER}{fingerprint(toml.encode())}\n{toml}"
        if not path.exists() or (
            _is_resolved_recipe(path) and path.read_bytes() != content.encode()
        ):
            atomic_write(path, content)


def _parse_record(line: bytes, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = json_error_message(error)
        raise UserError(f"{origin}: not valid JSON ({reason}); restore it from a copy") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise UserError(f"{origin}: not an object with a step number; restore it from a copy")
    return record


def _is_resolved_recipe(path: Path) -> bool:
    """Whether a file is a resolved recipe as moma wrote it, not edited since."""
    try:
        header, _, text = read_bounded(path).decode().partition("\n")
    except (OSError, ValueError):
        return False
    return header == _RECIPE_HEADER + fingerprint(text.encode())
