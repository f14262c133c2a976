"""The whole state of a codec's training in one file, which is replaced in one move.

parts by name (modules and optimizers) ↔ tensors `part.name` in safetensors
"""

import errno
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from moma.errors import UserError
from moma.files import atomic_replace

Parts = Mapping[str, nn.Module | Optimizer]


def save_state(file: Path, parts: Parts, identity: str, step: int) -> None:
    """Write the state beside the old one, bring it to the disk, then replace that in one move.

    Args:
        file: where; its folder is made if needed.
        parts: what the state is made of.
        identity: what has to be the same for a state to be resumed.
        step: steps done.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, owner in parts.items()
        for name, value in _tensors(owner).items()
    }
    metadata = {"step": str(step), "identity": identity}
    atomic_replace(file, lambda path: write_tensors(tensors, path, metadata))


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name into a safetensors file.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    # The library has an exception of its own, derived from Exception alone.
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot write it ({error})", str(path)) from error


def restore_state(file: Path, parts: Parts, identity: str) -> int:
    """Read the state, if there is one; returns how many steps it has seen.

    Raises:
        UserError: the file is damaged, or its identity is another one.
    """
    if not file.exists():
        return 0
    try:
        with safe_open(file, "pt") as state:
            metadata = state.metadata() or {}
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
    # safetensors reports damage with an exception of its own, derived from Exception alone.
    except Exception as error:
        raise UserError(f"{file}: damaged ({error}); delete it to start anew") from error
    if metadata.get("identity") != identity:
        raise UserError(
            f"{file}: left by training with another configuration, seed or set of images; "
            "delete it to start anew"
        )
    for part, owner in parts.items():
        prefix = part + "."
        _load(
            owner,
            {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            },
        )
    return int(metadata["step"])


def _tensors(owner: nn.Module | Optimizer) -> dict[str, Tensor]:
    if isinstance(owner, nn.Module):
        return owner.state_dict()
    return {
        f"{index}.{name}": value
        for index, values in owner.state_dict()["state"].items()
        for name, value in values.items()
    }


def _load(owner: nn.Module | Optimizer, tensors: dict[str, Tensor]) -> None:
    if isinstance(owner, nn.Module):
        owner.load_state_dict(tensors)
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    owner.load_state_dict({"state": state, "param_groups": owner.state_dict()["param_groups"]})
