"""Upcycling of a trained seed to more experts (MoMa §2.5; sparse upcycling, arXiv 2212.05055).

    seed: one expert per modality, or dense  →  every feed-forward becomes a group of copies

Also copied are attention, norms, embeddings, head, and the routers of mixture-of-depths and of
groups that do not change, with the biases of token choice. All other routers are newly initialized.
For the effect on the first step, see docs/upcycling.md.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.groups import GroupConfig
from moma.model.transformer import Transformer
from moma.runtime.weights import Weights

# Keys that may differ between the seed and the upcycled model; all others determine the copied
# weights or what they compute.
_MAY_DIFFER = {"groups", "depth", "token_choice"}
_MAY_DIFFER |= {"dropout", "router_noise", "experts_implementation"}
_PARTS = ("gate", "up", "down")  # stacks of matrices in `ExpertGroup`
_IN_DENSE_GROUP = {f"feed_forward.{part}.weight": part for part in _PARTS}
_IN_GROUP = re.compile(r"(layers\.\d+\.experts\.groups)\.(\d+)\.(.+)")


class _Copy(NamedTuple):
    """The seed's weight that a parameter is copied from, and a function that reshapes it."""

    name: str
    reshape: Callable[[Tensor], Tensor] = lambda weight: weight


@torch.no_grad()
def upcycle(
    weights: Weights,
    seed: ModelConfig,
    model: Transformer,
    fill: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Copy a seed's weights into a freshly initialized model, in place and layer by layer.

    Args:
        weights: the seed's weights, by their names in its state dict.
        seed: the seed's configuration.
        model: not yet trained; may be sharded if `fill` supports it.
        fill: copies a whole tensor into a parameter.

    Raises:
        UserError: the seed does not fit; the model is unchanged.
    """
    _check_seed(seed, model.config)
    sources = match_groups(seed.group_list, model.config.group_list)
    biases = [item for item in model.named_buffers() if item[0].endswith("router.bias_O")]
    tensors = sorted([*model.named_parameters(), *biases], key=lambda item: item[0])
    copies = {
        name: _copy_of(name, parameter, weights.meta_tensors, seed, model.config, sources)
        for name, parameter in tensors
    }
    for _, layer in groupby(tensors, lambda item: item[0].split(".")[:2]):
        pairs = [(parameter, copy) for name, parameter in layer if (copy := copies[name])]
        found = weights.read({copy.name for _, copy in pairs})
        for parameter, copy in pairs:
            fill(parameter, copy.reshape(found[copy.name]))
        del found  # before the next layer is read


def match_groups(seed: Sequence[GroupConfig], upcycled: Sequence[GroupConfig]) -> list[int]:
    """Return, for each upcycled group, the index of the seed's group that it is copied from.

    That is the group of the same modalities, or else the only one whose modalities include them.

    Raises:
        UserError: there is none, or tokens of a modality would be processed by other experts than
            before, or the number of experts of a group with several experts changes.
    """
    sources = [_source_group(group, seed) for group in upcycled]
    modalities = {name for group in (*seed, *upcycled) for name in group.modalities}
    for name in sorted(modalities):
        before = [number for number, group in enumerate(seed) if name in group.modalities]
        after = [s for s, group in zip(sources, upcycled, strict=True) if name in group.modalities]
        if sorted(after) != before:
            raise UserError(
                f"groups: {_named(upcycled)} cannot be upcycled from {_named(seed)}: '{name}' "
                "tokens would not use the same experts once each; keep or split the seed's groups"
            )
    for group, source in zip(upcycled, sources, strict=True):
        if seed[source].experts > 1 and seed[source] != group:
            raise UserError(
                f"groups: {_named([group])} cannot be upcycled from {_named([seed[source]])}: "
                "only a group of one expert can; keep the group, or use a seed with one expert"
            )
    return sources


def _source_group(group: GroupConfig, seed: Sequence[GroupConfig]) -> int:
    wanted = set(group.modalities)
    same = [n for n, each in enumerate(seed) if set(each.modalities) == wanted]
    wider = [n for n, each in enumerate(seed) if set(each.modalities) > wanted]
    found = same or wider
    if len(found) == 1:
        return found[0]
    count = "more than one group" if found else "no group"
    raise UserError(
        f"groups: {_named([group])} cannot be upcycled: {count} of the seed ({_named(seed)}) "
        f"processes all of {', '.join(group.modalities)}"
    )


def _named(groups: Sequence[GroupConfig]) -> str:
    return " + ".join(f"{'/'.join(group.modalities)} × {group.experts}" for group in groups)


def _check_seed(seed: ModelConfig, upcycled: ModelConfig) -> None:
    before, after = (_fixed_values(config) for config in (seed, upcycled))
    for key, value in after.items():
        if before[key] != value:
            raise UserError(
                f"model.{key}: the seed has {before[key]}, the recipe {value}; "
                "upcycling can change only groups and depth"
            )
    if any(group.experts > 1 for group in seed.group_list):
        one, other = seed.token_choice_config, upcycled.token_choice_config
        if (one and one.data_sparsity) != (other and other.data_sparsity):
            raise UserError(
                "model.token_choice: the routers of the seed's experts were trained for another "
                "way to choose; keep it, or use a seed with one expert per modality"
            )
    if lost := sorted(seed.depth_layers - upcycled.depth_layers):
        raise UserError(
            f"model.depth: the seed has mixture-of-depths in layer {lost[0]}, the recipe does not; "
            "keep it in the seed's layers"
        )


def _fixed_values(config: ModelConfig) -> dict[str, object]:
    """The values that must be equal, with defaults filled in."""
    values = config.model_dump(exclude=_MAY_DIFFER | {"hidden_multiple"})
    return values | {"hidden": config.hidden_width, "kv_heads": config.key_heads}


def _copy_of(
    name: str,
    parameter: Tensor,
    meta_tensors: Mapping[str, Tensor],
    seed: ModelConfig,
    upcycled: ModelConfig,
    sources: Sequence[int],
) -> _Copy | None:
    """Return what a parameter is copied from; None: it keeps its initial value."""
    if ".auxiliary." in name:
        return None
    if ".depth." in name and int(name.split(".")[1]) not in seed.depth_layers:
        return None
    if match := _IN_GROUP.fullmatch(name):
        prefix, number, part = match.groups()
        source = sources[int(number)]
        experts = upcycled.group_list[int(number)].experts
        if part.startswith("router.") and seed.group_list[source].experts != experts:
            return None
        copies = experts // seed.group_list[source].experts
        copy = _in_group(f"{prefix}.{source}", part, copies, meta_tensors)
    else:
        copy = _Copy(name)
    if copy.name not in meta_tensors:
        raise UserError(f"the seed has no weight '{copy.name}'; was it trained with its recipe?")
    shape = copy.reshape(meta_tensors[copy.name]).shape
    if shape != parameter.shape:
        raise UserError(
            f"the seed's '{name}' is {list(shape)}, the model's {list(parameter.shape)}; "
            "was it trained with this recipe and vocabulary?"
        )
    return copy


def _in_group(prefix: str, part: str, copies: int, meta_tensors: Mapping[str, Tensor]) -> _Copy:
    """Return the copy of a weight from the seed's group `prefix`.

    `DenseGroup` has linear layers [out, in], other groups stacks [E·in, out].
    """
    kind = _IN_DENSE_GROUP.get(part, part)
    if kind not in _PARTS:
        return _Copy(f"{prefix}.{part}")
    linear = f"{prefix}.feed_forward.{kind}.weight"
    is_linear, becomes_linear = linear in meta_tensors, part != kind

    def reshape(weight: Tensor) -> Tensor:
        return (weight if is_linear == becomes_linear else weight.T).repeat(copies, 1)

    return _Copy(linear if is_linear else f"{prefix}.{kind}", reshape)
