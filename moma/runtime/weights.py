"""Weights without a model: named tensors in safetensors files, never all of them in memory."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moma.errors import UserError

FILE_BYTES = 2**31
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """Named tensors that are read when they are asked for.

    Attributes:
        outlines: shape and type of each, as a tensor on the meta device.
        read: gives those of some names.
    """

    outlines: dict[str, Tensor]
    read: Callable[[Iterable[str]], dict[str, Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        """Tensors that are in memory already."""
        outlines = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return cls(outlines, lambda names: {name: tensors[name] for name in names})

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """The weights that `names` leads from, under the names that it leads to."""
        former = {new: old for old, new in names.items()}

        def read(wanted: Iterable[str]) -> dict[str, Tensor]:
            found = self.read(former[name] for name in wanted)
            return {names[old]: tensor for old, tensor in found.items()}

        return Weights({names[old]: self.outlines[old] for old in names}, read)

    def __or__(self, other: "Weights") -> "Weights":
        """These and others, of other names."""

        def read(wanted: Iterable[str]) -> dict[str, Tensor]:
            names = set(wanted)
            return self.read(names - other.outlines.keys()) | other.read(
                names & other.outlines.keys()
            )

        return Weights(self.outlines | other.outlines, read)


def open_weights(folder: Path) -> Weights:
    """The weights in `model.safetensors`, or in the files that its index names.

    Raises:
        UserError: there are none, or a file is missing or damaged.
    """
    file_of: dict[str, Path] = {}
    outlines: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    file_of[name] = file
                    outlines[name] = opened.get_tensor(name).to("meta")  # mapped, not read
        except Exception as error:  # the library's own exception derives from nothing else
            raise UserError(f"{file}: cannot read the weights ({error})") from error

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        wanted: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            wanted[file_of[name]].append(name)
        found: dict[str, Tensor] = {}
        for file, its in wanted.items():
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in its}
        return found

    return Weights(outlines, read)


def write_weights(weights: Weights, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write `model.safetensors`, or several files and their index.

    Args:
        weights: what to write.
        folder: an empty folder.
        file_bytes: most bytes of a file, unless a single tensor takes more; as much is held in
            memory.
    """
    plan = split_torch_state_dict_into_shards(weights.outlines, max_shard_size=file_bytes)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: tensor.contiguous() for name, tensor in weights.read(names).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        names = [_FILE]
    else:
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside of the folder")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{index}: not an index of weights ({error!r})") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} is missing; weights must be there as safetensors files"
        )
    return [folder / name for name in names]
