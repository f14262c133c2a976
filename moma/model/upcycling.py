"""Growing a trained seed into more experts (MoMa §2.5; sparse upcycling, arXiv 2212.05055).

    seed: one expert for each modality, or dense  →  every feed-forward becomes a group of copies

Copied: attention, norms, embeddings, head, experts; the gates of mixture-of-depths and the routers
of groups that stay as they are. New, as freshly drawn: routers of grown groups, gates that the seed
has not, every auxiliary router. What that means for the first step: docs/upcycling.md.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.experts import GroupConfig
from moma.model.transformer import Transformer
from moma.runtime.weights import Weights

# What may differ between seed and grown model; everything else decides the weights that are copied
# or what they compute.
_FREE = {"groups", "depth", "dropout", "router_noise", "experts_implementation"}
_PARTS = ("gate", "up", "down")
_IN_GROUP = re.compile(r"(layers\.\d+\.experts\.groups)\.(\d+)\.(.+)")


class _Copy(NamedTuple):
    """What a parameter starts from: a weight of the seed, brought into shape without a copy."""

    name: str
    shaped: Callable[[Tensor], Tensor]


def grow(seed_state: Mapping[str, Tensor], seed: ModelConfig, model: Transformer) -> None:
    """Fill a freshly initialised model with a seed's weights, in place.

    Args:
        seed_state: the seed's state dict, whole tensors.
        seed: its configuration.
        model: unsharded and not yet trained; its new routers and gates stay as they are.

    Raises:
        UserError: the seed does not fit; the model is as it was.
    """
    upcycle_from(Weights.of(seed_state), seed, model)


@torch.no_grad()
def upcycle_from(
    weights: Weights,
    seed: ModelConfig,
    model: Transformer,
    fill: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """The same from weights that are read layer by layer.

    Args:
        weights: the seed's, by the names of its state dict.
        seed: its configuration.
        model: not yet trained; sharded if `fill` knows how to.
        fill: puts whole values into a parameter.

    Raises:
        UserError: the seed does not fit; the model is as it was.
    """
    _require_same_shape(seed, model.config)
    _require_gates_kept(seed, model.config)
    sources = match_groups(seed.group_list, model.config.group_list)
    copies = {
        name: _source_of(name, parameter, weights.outlines, seed, model.config, sources)
        for name, parameter in model.named_parameters()
    }

    def copy(parts: Iterable[tuple[str, Tensor]]) -> None:
        wanted = [(part, made) for name, part in parts if (made := copies[name]) is not None]
        found = weights.read({made.name for _, made in wanted})
        for parameter, made in wanted:
            fill(parameter, made.shaped(found[made.name]))

    for _, parts in groupby(model.named_parameters(), lambda part: part[0].split(".")[:2]):
        copy(parts)


def match_groups(seed: Sequence[GroupConfig], grown: Sequence[GroupConfig]) -> list[int]:
    """For each group of the grown model, the number of the seed's group that it is made of.

    That is the one of the same modalities, or else the only one that takes them all.

    Raises:
        UserError: there is none, or tokens of a modality would meet other experts than before, or a
            group has several experts and is to have another number of them.
    """
    sources = [_source_group(group, seed) for group in grown]
    modalities = {name for group in (*seed, *grown) for name in group.modalities}
    for name in sorted(modalities):
        before = [number for number, group in enumerate(seed) if name in group.modalities]
        after = [s for s, group in zip(sources, grown, strict=True) if name in group.modalities]
        if sorted(after) != before:
            raise UserError(
                f"groups: {_named(grown)} cannot grow from {_named(seed)}: '{name}' tokens would "
                "not meet the same experts once each; keep the seed's groups, or divide them"
            )
    for group, source in zip(grown, sources, strict=True):
        count = seed[source].experts
        if count > 1 and seed[source] != group:
            raise UserError(
                f"groups: {_named([group])} cannot grow from {_named([seed[source]])}: a group "
                "grows from one expert; keep it as it is, or start from a seed with one"
            )
    return sources


def _source_group(group: GroupConfig, seed: Sequence[GroupConfig]) -> int:
    wanted = set(group.modalities)
    same = [n for n, each in enumerate(seed) if set(each.modalities) == wanted]
    wider = [n for n, each in enumerate(seed) if set(each.modalities) > wanted]
    for found in (same, wider):
        if len(found) == 1:
            return found[0]
        if found:
            break
    several = "more than one group" if same or wider else "no group"
    raise UserError(
        f"groups: {several} of the seed ({_named(seed)}) takes all of {', '.join(group.modalities)}"
        f", so {_named([group])} cannot grow from it"
    )


def _named(groups: Sequence[GroupConfig]) -> str:
    return " + ".join(f"{'/'.join(group.modalities)} × {group.experts}" for group in groups)


def _require_same_shape(seed: ModelConfig, grown: ModelConfig) -> None:
    before, after = (_decisive(config) for config in (seed, grown))
    for key, value in after.items():
        if before[key] != value:
            raise UserError(
                f"model.{key}: the seed has {before[key]}, the recipe {value}; "
                "a seed grows in experts and gates alone"
            )


def _decisive(config: ModelConfig) -> dict[str, object]:
    """The values that must be alike, those that may be left out spelled out."""
    values = {key: value for key, value in config.model_dump().items() if key not in _FREE}
    del values["hidden_multiple"]
    return values | {"hidden": config.hidden_width, "kv_heads": config.key_heads}


def _require_gates_kept(seed: ModelConfig, grown: ModelConfig) -> None:
    if lost := sorted(seed.depth_layers - grown.depth_layers):
        raise UserError(
            f"model.depth: the seed chooses its tokens in layer {lost[0]}, the recipe does not; "
            "keep mixture-of-depths where the seed has it"
        )


def _source_of(
    name: str,
    parameter: Tensor,
    outlines: Mapping[str, Tensor],
    seed: ModelConfig,
    grown: ModelConfig,
    sources: Sequence[int],
) -> _Copy | None:
    """What a parameter starts from; None: from what it was drawn."""
    if ".auxiliary." in name:
        return None
    if ".depth." in name and int(name.split(".")[1]) not in seed.depth_layers:
        return None
    if match := _IN_GROUP.fullmatch(name):
        prefix, number, part = match.groups()
        source = sources[int(number)]
        experts = grown.group_list[int(number)].experts
        if part == "router.weight" and seed.group_list[source].experts != experts:
            return None
        copy = _in_group(f"{prefix}.{source}", part, experts, outlines)
    else:
        copy = _Copy(name, _as_it_is)
    if copy.name not in outlines:
        raise UserError(
            f"the seed has no weight '{copy.name}'; was it trained with the recipe it names?"
        )
    shape = copy.shaped(outlines[copy.name]).shape
    if shape != parameter.shape:
        raise UserError(
            f"the seed's '{name}' is {list(shape)}, the model's {list(parameter.shape)}; "
            "was it trained with this recipe and vocabulary?"
        )
    return copy


def _in_group(prefix: str, part: str, experts: int, outlines: Mapping[str, Tensor]) -> _Copy:
    """A weight of a group from the seed's group `prefix`, whichever of two forms either has.

    A group for all modalities with one expert keeps plain linear maps [out, in], others a stack
    [E, in, out].
    """
    kind, stacked = part.split("_")[0].split(".")[0], "_" in part
    if kind not in _PARTS:
        return _Copy(f"{prefix}.{part}", _as_it_is)
    plain = f"{prefix}.{kind}.weight"
    was_plain = plain in outlines

    def shaped(weight: Tensor) -> Tensor:
        weight_EIO = weight.T[None] if was_plain else weight
        if not stacked:
            return weight_EIO[0].T
        return weight_EIO.expand(experts, -1, -1) if len(weight_EIO) == 1 else weight_EIO

    name = plain if was_plain else f"{prefix}.{kind}_{'EFD' if kind == 'down' else 'EDF'}"
    return _Copy(name, shaped)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight
