"""Statistics of a logged step: routers by layer and group, gradient norms by kind of parameter.

All are sums on the device, to be summed over ranks and copied to the host once.

Shapes: see `model/layers.py`; M modalities.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moma.model.layers import upcast
from moma.model.routers import RouterRecord
from moma.model.transformer import Transformer
from moma.runtime.sharding import local_part

# Substrings of a parameter's name that determine its kind; the first match counts.
_KINDS = {
    "auxiliary": ".auxiliary.",
    "routers": ".router.",
    "norms": "norm",
    "attention": ".attention.",
    "experts": ".experts.",
    "embedding": "embedding",
    "head": "head",
}


class Statistics:
    """Collects the statistics of one step on this rank in `sums`, to be summed over all ranks."""

    def __init__(self, model: Transformer, replicas: int = 1):
        """Create empty statistics; `replicas` ranks hold the same shard (hybrid sharding)."""
        self.sums: dict[str, Tensor] = {}
        self._model, self._replicas = model, replicas

    def add_routers(self, records: Sequence[RouterRecord], tokens_BS: Tensor) -> None:
        """Add the routers' selections for a micro-batch.

        Args:
            records: of all routers, as in `ModelOutput.routers`.
            tokens_BS: ids of the micro-batch.
        """
        modality_N = self._model.modality_of_id[tokens_BS.flatten()]
        modality_NM = functional.one_hot(modality_N, len(self._model.vocabulary.modalities)).float()
        for index, record in enumerate(records):
            self.sums[f"router {index}"] = _router_sums(record, modality_NM)
            if record.excess is not None:
                self.sums[f"excess {index}"] = record.excess

    def add_gradients(self) -> None:
        """Add the gradients of all parameters; call it before they are clipped."""
        squares: dict[str, list[Tensor]] = {}
        for name, parameter in self._model.named_parameters():
            if (grad := parameter.grad) is not None:
                kind = next(kind for kind, part in _KINDS.items() if part in f".{name}")
                squares.setdefault(kind, []).append(upcast(local_part(grad)).square().sum())
        for kind, parts in squares.items():
            self.sums[f"gradient {kind}"] = torch.stack(parts).sum() / self._replicas


def describe(
    sums: Mapping[str, Tensor], model: Transformer, trains_routers: bool
) -> dict[str, dict[str, Any]]:
    """Convert sums over all ranks, on the host, to the log's `gradient_norms` and `routers`.

    Args:
        sums: `Statistics.sums`, summed over ranks.
        trains_routers: whether auxiliary routers are trained; else their agreement is left out.
    """
    routers = {}
    for index, name in enumerate(router_names(model)):
        if (router_sums := sums.get(f"router {index}")) is not None:
            is_depth = name.endswith("depth")
            takes = not is_depth and model.config.token_choice_config is not None
            names = model.vocabulary.modalities
            routers[name] = _describe_router(router_sums, is_depth, takes, names)
            if not trains_routers or takes:  # auxiliary routers are untrained, or there is none
                del routers[name]["agreement"]
            if not takes and (excess := sums.get(f"excess {index}")) is not None:
                routers[name]["excess"] = int(excess)
    norms = {
        key.removeprefix("gradient "): float(value.sqrt())
        for key, value in sums.items()
        if key.startswith("gradient ")
    }
    return {"gradient_norms": norms, "routers": routers}


def router_names(model: Transformer) -> list[str]:
    """`LAYER.MODALITIES` or `LAYER.depth` for each router, in the order of the router records."""
    found = []
    names = model.vocabulary.modalities
    for number, layer in enumerate(model.units()):
        for group in layer.experts.groups:
            if hasattr(group, "router"):
                found.append(f"{number}.{'+'.join(names[m] for m in group.modalities)}")  # type: ignore[union-attr]
        if hasattr(layer, "depth"):
            found.append(f"{number}.depth")
    return found


def _router_sums(record: RouterRecord, modality_NM: Tensor) -> Tensor:
    """Sums over tokens in the order that `_describe_router` reads, [8 + 2·M]."""
    selected_NE, eligible_N = record.selected_NE, record.eligible_N.float()
    eligible_NM = modality_NM * eligible_N[:, None]
    experts_N = selected_NE.sum(1)
    logits_NE = upcast(record.logits_NE)
    score_NE = logits_NE.sigmoid()
    min_score_E = torch.where(selected_NE > 0, score_NE, torch.inf).amin(0)
    entropy_N = (functional.softplus(logits_NE) - logits_NE * score_NE).mean(1)
    agrees_NE = torch.zeros_like(selected_NE)  # `describe` omits it without auxiliary logits
    if record.auxiliary_logits_NE is not None:
        agrees_NE = ((record.auxiliary_logits_NE > 0) == (selected_NE > 0)).float()
    sums = (
        eligible_N.sum(),
        ((experts_N == 0) * eligible_N).sum(),
        ((experts_N > 1) * eligible_N).sum(),
        torch.where(min_score_E.isfinite(), min_score_E, 0.0).mean(),
        eligible_N.new_ones(()),  # becomes the number of ranks
        (entropy_N * eligible_N).sum(),
        (agrees_NE.mean(1) * eligible_N).sum(),
        eligible_N.new_zeros(()) if record.excess is None else record.excess,
    )
    by_modality = (experts_N[:, None] * eligible_NM).sum(0), eligible_NM.sum(0)
    return torch.cat((torch.stack(sums), *by_modality)).detach()


def _describe_router(
    sums: Tensor, is_depth: bool, is_token_choice: bool, names: Sequence[str]
) -> dict[str, Any]:
    tokens, dropped, multi_expert, min_score, ranks, entropy, agrees, excess = sums[:8].tolist()
    tokens = max(1, tokens)
    selected_M, eligible_M = sums[8:].view(2, -1).tolist()
    by_modality = zip(names, selected_M, eligible_M, strict=True)
    of_modality = {name: selected / count for name, selected, count in by_modality if count}
    fractions: dict[str, Any] = {
        "dropped_fraction": dropped / tokens,
        "multi_expert_fraction": multi_expert / tokens,
    }
    if is_depth:
        fractions = {"token_fraction": of_modality}
    if is_token_choice:
        fractions["dropped_fraction"] = excess / max(1, sum(selected_M) + excess)
        fractions["experts_per_token"] = of_modality
    return fractions | {
        "min_score": min_score / ranks,
        "entropy": entropy / tokens,
        "agreement": agrees / tokens,
    }
