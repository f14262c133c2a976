"""What a logged step shows of the model's inside: its routers, and its gradients by kind.

Everything is a sum on the device, to be added up between ranks and read once.

Shapes: see `model/layers.py`; M modalities.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from moma.model.layers import upcast
from moma.model.routers import RouterRecord
from moma.model.transformer import Transformer

# Parts of a parameter's name that tell its kind; the first that fits counts.
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
    """Collects the statistics of one step on this rank.

    Attributes:
        sums: by name, each a tensor to be summed over all ranks.
    """

    def __init__(self, model: Transformer, copies: int = 1):
        """Begin with nothing.

        Args:
            model: whose step it is.
            copies: ranks that hold the same part of a gradient, as under hybrid sharding.
        """
        self.sums: dict[str, Tensor] = {}
        self._model, self._copies = model, copies

    def see_routers(self, records: Sequence[RouterRecord], tokens_BS: Tensor) -> None:
        """Take what the routers of a micro-batch did."""
        table = self._model.modality_of_id
        modality_NM = functional.one_hot(table[tokens_BS.flatten()], len(self._names)).float()
        for index, record in enumerate(records):
            self.sums[f"router {index}"] = _router_sums(record, modality_NM)

    def see_gradients(self) -> None:
        """Take the gradients of all parameters, before they are clipped."""
        squares: dict[str, list[Tensor]] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                own = grad.to_local() if isinstance(grad, DTensor) else grad
                squares.setdefault(_kind(name), []).append(upcast(own).square().sum())
        for kind, parts in squares.items():
            self.sums[f"gradient {kind}"] = torch.stack(parts).sum() / self._copies

    @property
    def _names(self) -> Sequence[str]:
        return self._model.vocabulary.modalities


def describe(
    sums: Mapping[str, Tensor], model: Transformer, trains_routers: bool
) -> dict[str, dict[str, Any]]:
    """Turn sums over all ranks, read from the device, into what a row of the log shows.

    Returns:
        `gradient_norms` by kind of parameter, and `routers` by layer and group, as in
        `docs/train.md`.
    """
    routers, names = {}, router_names(model)
    for index, name in enumerate(names):
        if (found := sums.get(f"router {index}")) is not None:
            told = _describe_router(found, name.endswith("depth"), model.vocabulary.modalities)
            if not trains_routers:
                del told["agreement"]  # nothing was learned yet
            routers[name] = told
    norms = {
        key.removeprefix("gradient "): float(value.sqrt())
        for key, value in sums.items()
        if key.startswith("gradient ")
    }
    return {"gradient_norms": norms, "routers": routers}


def router_names(model: Transformer) -> list[str]:
    """`layer.modalities` or `layer.depth` for each router, in the order of the records."""
    found = []
    names = model.vocabulary.modalities
    for number, layer in enumerate(model.layers):
        for group in layer.experts.groups:  # type: ignore[union-attr]
            if hasattr(group, "router"):
                found.append(f"{number}.{'+'.join(names[m] for m in group.modalities)}")  # type: ignore[union-attr]
        if hasattr(layer, "depth"):
            found.append(f"{number}.depth")
    return found


def _router_sums(record: RouterRecord, modality_NM: Tensor) -> Tensor:
    """Sums over tokens: counts, cuts, entropies, agreement, chosen tokens and all by modality."""
    selected_NE, eligible_N = record.selected_NE, record.eligible_N.float()
    eligible_NM = modality_NM * eligible_N[:, None]
    taken_N = selected_NE.sum(1)
    logits_NE = upcast(record.logits_NE)
    score_NE = logits_NE.sigmoid()
    nobody = torch.full_like(score_NE, torch.inf)
    cut_E = torch.where(selected_NE > 0, score_NE, nobody).amin(0)
    entropy_N = (functional.softplus(logits_NE) - logits_NE * score_NE).mean(1)
    predicted_NE = score_NE if record.auxiliary_logits_NE is None else record.auxiliary_logits_NE
    right_NE = ((predicted_NE > 0) == (selected_NE > 0)).float()
    one = eligible_N.new_ones(())
    return torch.cat(
        (
            torch.stack(
                (
                    eligible_N.sum(),
                    ((taken_N == 0) * eligible_N).sum(),
                    ((taken_N > 1) * eligible_N).sum(),
                    torch.where(cut_E.isfinite(), cut_E, 0.0).mean(),
                    one,
                    (entropy_N * eligible_N).sum(),
                    (right_NE.mean(1) * eligible_N).sum(),
                )
            ),
            (taken_N[:, None] * eligible_NM).sum(0),
            eligible_NM.sum(0),
        )
    ).detach()


def _describe_router(sums: Tensor, depth: bool, names: Sequence[str]) -> dict[str, Any]:
    tokens, dropped_fraction, several, cut, ranks, entropy, right = sums[:7].tolist()
    told = {
        "cut": cut / ranks,
        "entropy": entropy / max(1, tokens),
        "agreement": right / max(1, tokens),
    }
    if not depth:
        return {
            "dropped_fraction": dropped_fraction / max(1, tokens),
            "several": several / max(1, tokens),
        } | told
    chosen_M, all_M = sums[7:].view(2, -1).tolist()
    shares = {
        name: chosen / count
        for name, chosen, count in zip(names, chosen_M, all_M, strict=True)
        if count
    }
    return {"share": shares} | told


def _kind(name: str) -> str:
    return next(kind for kind, part in _KINDS.items() if part in f".{name}")
