"""Which experts process each token of a document, and which layers it goes through.

All of it comes from the records that the model's routers return; see `RouterRecord`. A group of one
expert has no router: it processes every token of its modalities that the layer processes.

Shapes: S tokens of a document, L layers, E experts of a group.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import Batch
from moma.generate.mixed import MixedModel
from moma.model.experts import ExpertGroup
from moma.model.routers import RouterRecord
from moma.model.routing import RoutingName
from moma.model.transformer import Transformer, no_head
from moma.train.recipe import Recipe
from moma.train.step import run_model, to_device
from moma.vocabulary import Vocabulary

# Whether each token is selected, 1 or 0, and its weight, both fp32 [S, E].
_Selected = tuple[np.ndarray, np.ndarray]


class GroupRouting(NamedTuple):
    """The tokens that the experts of a group process.

    Attributes:
        taken_LSE: whether expert e of layer l processes token s.
        weight_LSE: factor of the expert's output, fp32; 0 where it does not process the token.
    """

    modalities: tuple[str, ...]
    taken_LSE: np.ndarray
    weight_LSE: np.ndarray


class TokenRouting(NamedTuple):
    """The routing of a document.

    Attributes:
        groups: the groups of experts, the same in all layers.
        depth_layers: numbers of the layers with mixture-of-depths.
        processed_LS: whether a layer processes a token.
        weight_LS: factor of the layer's update, fp32; 1 without mixture-of-depths, 0 where the
            layer does not process the token.
    """

    routing: RoutingName
    ids_S: np.ndarray
    groups: list[GroupRouting]
    depth_layers: frozenset[int]
    processed_LS: np.ndarray
    weight_LS: np.ndarray


def first_tokens(ids: np.ndarray, context: int, vocabulary: Vocabulary) -> np.ndarray:
    """The beginning of a document that the model can read at once; it does not cut an image."""
    if len(ids) <= context:
        return ids
    begins = np.flatnonzero(ids == vocabulary.begin_image)
    cut = begins[(begins < context) & (begins + vocabulary.image_span > context)]
    return ids[: cut[0] if len(cut) else context]


@torch.no_grad()
def route_document(
    model: Transformer, ids_S: np.ndarray, routing: RoutingName, batch: Batch | None = None
) -> TokenRouting:
    """Run a model on a document, and collect how it routes the tokens.

    Args:
        model: the model, in evaluation mode.
        ids_S: the document, at most a sequence.
        routing: see `Transformer.named_routing`.
        batch: a micro-batch in which the document replaces the first sequence, since under `choice`
            all tokens of a micro-batch compete; if omitted, they compete within the document.

    Raises:
        UserError: a layer's output or a router's logit is NaN or infinite.
    """
    how, device = model.named_routing(routing, record_selection=True), model.embedding.weight.device
    if batch is None:
        tokens_1S = torch.from_numpy(ids_S.astype(np.int64))[None].to(device)
        output = model(tokens_1S, routing=how, head=no_head)
    else:
        batch = _with_document(batch, ids_S, model.vocabulary.padding)
        output = run_model(model, to_device(batch, device), how, no_head)
    records, modality_S = iter(output.routers), model.vocabulary.modality_of_id[ids_S]
    layers = [_layer_routing(layer, records, modality_S) for layer in model.layers]
    of_depth, by_layer = zip(*layers, strict=True)
    return TokenRouting(
        routing,
        ids_S,
        [
            GroupRouting(
                group.modalities,
                np.stack([taken > 0 for taken, _ in of_layers]),
                np.stack([weight for _, weight in of_layers]),
            )
            for group, of_layers in zip(
                model.config.group_list, zip(*by_layer, strict=True), strict=True
            )
        ],
        model.config.depth_layers,
        np.stack([taken[:, 0] > 0 for taken, _ in of_depth]),
        np.stack([weight[:, 0] for _, weight in of_depth]),
    )


def training_batch(recipe: Recipe, vocabulary: Vocabulary) -> Batch:
    """A micro-batch of training documents, for `route_document`.

    Raises:
        UserError: the data is missing, or has another vocabulary.
    """
    with closing(Batches(recipe.data, vocabulary, recipe.seed)) as batches:
        return next(iter(batches))


def as_json_value(mixed: MixedModel, routed: TokenRouting) -> dict[str, Any]:
    """A routing as JSON: `groups`, `depth_layers` and `tokens`; see `describe_tokens`."""
    return {
        "groups": [
            {"modalities": group.modalities, "experts": group.taken_LSE.shape[2]}
            for group in routed.groups
        ],
        "depth_layers": sorted(routed.depth_layers),
        "tokens": list(describe_tokens(mixed, routed)),
    }


def describe_tokens(mixed: MixedModel, routed: TokenRouting) -> Iterator[dict[str, Any]]:
    """Yield each token of a document with its routing, JSON-serializable.

    Yields:
        `id`; `text`, or for an image code `image` (from 1), `code`, `row` and `column` (from 0);
        `layers`: for each layer, `weight`: the factor of the layer's update, null where it does not
        process the token, and `experts`: the `group`, number (from 0) and `weight` of each.
    """
    side = round(mixed.model.vocabulary.codes_per_image**0.5)
    image = place = 0
    for index, id_ in enumerate(routed.ids_S.tolist()):
        code = int(mixed.model.vocabulary.code_of_id[id_])
        if code >= 0:
            row, column = divmod(place, side)
            about: dict[str, Any] = {"image": image, "code": code, "row": row, "column": column}
            place += 1
        else:
            about = {"text": mixed.tokenizer.decode([id_], skip_special_tokens=False)}
            if id_ == mixed.model.vocabulary.begin_image:
                image, place = image + 1, 0
        layers = [
            {
                "weight": float(weight_S[index]) if processed_S[index] else None,
                "experts": [
                    {
                        "group": number,
                        "expert": int(expert),
                        "weight": float(group.weight_LSE[layer, index, expert]),
                    }
                    for number, group in enumerate(routed.groups)
                    for expert in np.flatnonzero(group.taken_LSE[layer, index])
                ],
            }
            for layer, (weight_S, processed_S) in enumerate(
                zip(routed.weight_LS, routed.processed_LS, strict=True)
            )
        ]
        yield {"id": id_, **about, "layers": layers}


def _layer_routing(
    layer: Any, records: Iterator[RouterRecord], modality_S: np.ndarray
) -> tuple[_Selected, list[_Selected]]:
    """What a layer's depth router and each of its groups selected, from the next of the records."""
    tokens = len(modality_S)
    ones_S1 = np.ones((tokens, 1), np.float32)
    groups = [
        _first_rows(next(records), tokens)
        if hasattr(group, "router")
        else (ones_S1 * _is_eligible(group, modality_S)[:, None],) * 2
        for group in layer.experts.groups
    ]
    depth = _first_rows(next(records), tokens) if hasattr(layer, "depth") else (ones_S1, ones_S1)
    return depth, [(taken * depth[0], weight * depth[0]) for taken, weight in groups]


def _first_rows(record: RouterRecord, tokens: int) -> _Selected:
    """What a router selected of the first tokens."""
    taken, weight = (
        part_NE[:tokens].float().cpu().numpy() for part_NE in (record.selected_NE, record.weight_NE)
    )
    return taken, weight


def _is_eligible(group: Any, modality_S: np.ndarray) -> np.ndarray:
    """Whether a group without a router processes tokens, [S]."""
    if isinstance(group, ExpertGroup):
        return np.isin(modality_S, group.modalities)
    return np.ones(len(modality_S), dtype=bool)


def _with_document(batch: Batch, ids_S: np.ndarray, padding: int) -> Batch:
    """A micro-batch with a document, and padding after it, instead of the first sequence."""
    tokens_BS, document_ids_BS, positions_BS = (
        part_BS.copy() for part_BS in (batch.tokens_BS, batch.document_ids_BS, batch.positions_BS)
    )
    tokens_BS[0], document_ids_BS[0], positions_BS[0] = padding, -1, 0
    tokens_BS[0, : len(ids_S)], document_ids_BS[0, : len(ids_S)] = ids_S, 0
    positions_BS[0, : len(ids_S)] = np.arange(len(ids_S))
    return replace(
        batch, tokens_BS=tokens_BS, document_ids_BS=document_ids_BS, positions_BS=positions_BS
    )
