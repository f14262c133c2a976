"""Weights without a model: named tensors in safetensors files, never all of them in memory."""

import errno
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moma.errors import UserError, error_text, list_names
from moma.files import open_regular, read_json

FILE_BYTES = 2**31
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NUMBERED = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
_MAX_FILES = 10_000
# Buffers that follow from the configuration; older versions of `transformers` stored them.
_DERIVED_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|position_ids)$"
)


@dataclass(frozen=True)
class Weights:
    """Named tensors: `meta_tensors` has shape and dtype of each, `read` returns some of them."""

    meta_tensors: dict[str, Tensor]
    read: Callable[[Iterable[str]], dict[str, Tensor]]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        """Weights from tensors in memory."""
        meta_tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return cls(meta_tensors, lambda names: {name: tensors[name] for name in names})

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """The weights whose names are keys of `names`, under the values as new names."""
        former = {new: old for old, new in names.items()}

        def read(wanted: Iterable[str]) -> dict[str, Tensor]:
            found = self.read(former[name] for name in wanted)
            return {names[old]: tensor for old, tensor in found.items()}

        return Weights({names[old]: self.meta_tensors[old] for old in names}, read)

    def __or__(self, other: "Weights") -> "Weights":
        """The union with other weights; the names must not overlap."""

        def read(wanted: Iterable[str]) -> dict[str, Tensor]:
            names = set(wanted)
            return self.read(names - other.meta_tensors.keys()) | other.read(
                names & other.meta_tensors.keys()
            )

        return Weights(self.meta_tensors | other.meta_tensors, read)


def open_weights(folder: Path) -> Weights:
    """The weights of a model folder, by one rule for all readers.

    The tensors are those that `model.safetensors.index.json` names; without an index, those of
    `model.safetensors`, or of a complete set `model-00001-of-00002.safetensors`, …. Other files are
    not read (`unused_weight_files`), and neither are buffers that follow from the configuration.

    Raises:
        UserError: weights are missing or damaged, or the index does not match.
    """
    file_of: dict[str, Path] = {}
    meta_tensors: dict[str, Tensor] = {}
    for name, listed in _weight_files(folder).items():
        file = folder / name
        found = _meta_tensors(file)
        if listed is not None and (wrong := sorted(listed.symmetric_difference(found))):
            place = "which is not in it" if wrong[0] in listed else "which the index does not list"
            raise UserError(
                f"{file}: does not match {_INDEX}: {wrong[0]}, {place}; get a complete copy of the "
                "folder"
            )
        if twice := sorted(found.keys() & meta_tensors.keys()):
            raise UserError(
                f"{folder}: {twice[0]} is both in {file_of[twice[0]].name} and in {name}; keep the "
                "files of one model"
            )
        file_of |= dict.fromkeys(found, file)
        meta_tensors |= found

    return Weights(meta_tensors, partial(_read_from, file_of))


def open_file(file: Path) -> Weights:
    """The weights of a single safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
    found = _meta_tensors(file)
    return Weights(found, partial(_read_from, dict.fromkeys(found, file)))


def require_match(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    message: str,
    hint: str = "get a complete copy",
) -> None:
    """Check names, shapes and dtypes of weights; a float may have any dtype of `FLOAT_TYPES`.

    Args:
        expected: tensors as they should be, on any device.
        message, hint: begin and end the error's message.

    Raises:
        UserError: it names the first weights that are missing, unknown or different.
    """
    missing, unknown = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing or unknown:
        raise UserError(
            f"{message} ({len(missing)} missing: {list_names(missing, 3)}; "
            f"{len(unknown)} unknown: {list_names(unknown, 3)}); {hint}"
        )
    for name, tensor in found.items():
        shape, dtype = tuple(expected[name].shape), expected[name].dtype
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{message} ({name} has shape {tuple(tensor.shape)} instead of {shape}); {hint}"
            )
        if tensor.dtype not in (FLOAT_TYPES if dtype.is_floating_point else (dtype,)):
            raise UserError(f"{message} ({name} is {tensor.dtype}); convert it to {dtype}")


def unused_weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in a folder that `open_weights` does not read."""
    return sorted({path.name for path in folder.glob("*.safetensors")} - set(_weight_files(folder)))


def read_tensors(
    file: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors of a single file: safetensors, or what `torch.save` wrote; no code is run.

    Args:
        file: the file; `state_dict` in it is used, if there is one.
        wanted: which names to read.

    Raises:
        UserError: the file is missing, damaged, or contains more than tensors and plain values.
    """
    try:
        with open_regular(file) as binary:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    names = filter(wanted, opened.keys())
                    return {name: opened.get_tensor(name) for name in names}
            values: Any = torch.load(binary, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files the readers raise almost any exception
        hint = "; get a complete copy"
        if file.suffix != ".safetensors" and file.is_file():
            hint = "; if you trust the file, convert its state_dict to safetensors"
        raise UserError(f"{file}: cannot read the weights ({first_line(error)}){hint}") from error
    values = values.get("state_dict", values) if isinstance(values, dict) else {}
    values = values if isinstance(values, dict) else {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, Tensor) and wanted(name)
    }


def first_line(error: Exception) -> str:
    """The first line of a library's message, shortened."""
    lines = error_text(error).splitlines() or [type(error).__name__]
    return shorten(lines[0], 200, placeholder=" …")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file; raises `UserError` if it does not contain an object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; get a complete copy")
    return values


def write_weights(weights: Weights, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write `model.safetensors` into an empty folder, or several files and their index.

    Files have at most `file_bytes`, unless a single tensor is larger; as much is held in memory.
    """
    plan = split_torch_state_dict_into_shards(weights.meta_tensors, max_shard_size=file_bytes)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: tensor.contiguous() for name, tensor in weights.read(names).items()}
        save_tensors(tensors, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    is_new = not file.exists()
    file.touch()
    mode = file.stat().st_mode  # safetensors replaces the file by one that only its owner can read
    try:
        save_file(tensors, file, metadata=metadata)
        file.chmod(mode)
    except SafetensorError as error:  # which is no OSError
        if is_new:
            file.unlink()
        raise OSError(errno.EIO, f"cannot write ({error})", str(file)) from error


def _meta_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with open_regular(file), safe_open(file, "pt") as opened:
            return {
                name: opened.get_tensor(name).to("meta")  # memory-mapped, not read
                for name in opened.keys()  # noqa: SIM118
                if not _DERIVED_BUFFER.search(name)
            }
    except Exception as error:  # the library's own exception derives from nothing else
        message = f"{file}: cannot read the weights ({first_line(error)}); get a complete copy"
        raise UserError(message) from error


def _read_from(file_of: Mapping[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors, each from its file; a file is opened once."""
    wanted: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        wanted[file_of[name]].append(name)
    tensors: dict[str, Tensor] = {}
    for file, names_in_file in wanted.items():
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in names_in_file}
    return tensors


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Names of the files of weights; for each the tensors in it, if there is an index."""
    if (folder / _INDEX).is_file():
        files: dict[str, set[str] | None] = _read_index(folder)
    elif (folder / _FILE).is_file():
        return {_FILE: None}
    else:
        files = dict.fromkeys(_numbered_files(folder))
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        raise UserError(f"{folder}: {missing[0]} is missing; get a complete copy of the folder")
    if _FILE not in files and (folder / _FILE).is_file():
        raise UserError(
            f"{folder}: has both {_FILE} and {_INDEX}, which names other files; delete the one "
            "that is out of date"
        )
    return files


def _read_index(folder: Path) -> dict[str, set[str] | None]:
    index = folder / _INDEX
    entries = read_json_object(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{index}: not an index of weights (no weight_map); get a complete copy")
    files: dict[str, set[str]] = {}
    for tensor, name in entries.items():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise UserError(
                f"{index}: {tensor} is in {name!r}, outside of the folder; get a complete copy"
            )
        names = files.setdefault(name, set())
        if not _DERIVED_BUFFER.search(tensor):
            names.add(tensor)
    return {name: files[name] for name in sorted(files)}


def _numbered_files(folder: Path) -> list[str]:
    """The files of a model without an index: `model-00001-of-00003.safetensors`, …."""
    found = sorted(path.name for path in folder.glob("model-*.safetensors"))
    counts = {int(match[1]) for name in found if (match := _NUMBERED.fullmatch(name))}
    if len(counts) > 1:
        raise UserError(
            f"{folder}: has the files of several models ({', '.join(found[:3])}, …) and no "
            f"{_INDEX}; keep the files of one"
        )
    count = counts.pop() if counts else 0
    if not 0 < count <= _MAX_FILES:
        raise UserError(
            f"{folder}: {_FILE} is missing; weights must be there as safetensors files, with "
            f"{_INDEX} if there are several"
        )
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
