"""The method in slow NumPy, float64, token by token (METHOD: Eq. 1 to 4 of MoMa; Chameleon).

Nothing here is shared with the package but the weights, and the words of the configuration.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def numpy(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def slots(share: float, tokens: float) -> int:
    """A part of so many tokens, rounded up; products such as 0.3 · 10 are not exact."""
    return math.ceil(share * tokens - 1e-9)


def rms_norm(norm, x_ND):
    mean_square = (x_ND**2).mean(axis=-1, keepdims=True)
    return x_ND / np.sqrt(mean_square + norm.eps) * numpy(norm.weight)


def rotated(vector, position, theta):
    """RoPE with the pairs in the first and second half of a head."""
    half, output = len(vector) // 2, np.empty(len(vector))
    for pair in range(half):
        angle = position * theta ** (-pair / half)
        a, b = vector[pair], vector[pair + half]
        output[pair] = a * np.cos(angle) - b * np.sin(angle)
        output[pair + half] = b * np.cos(angle) + a * np.sin(angle)
    return output


def heads_of(linear, norm, x, width, position=None, theta=10_000.0):
    """Queries or keys of one token (normed and rotated), or values (without position), [H, C]."""
    heads = (numpy(linear.weight) @ x).reshape(-1, width)
    if position is None:
        return heads
    for h in range(len(heads)):
        if hasattr(norm, "weight"):
            heads[h] = (heads[h] - heads[h].mean()) / np.sqrt(heads[h].var() + 1e-5)
            heads[h] = heads[h] * numpy(norm.weight)[h] + numpy(norm.bias)[h]
        heads[h] = rotated(heads[h], position, theta)
    return heads


def attention(module, x_ND, position_N, seen_by, theta=10_000.0):
    """Attention of every token n over the tokens `seen_by[n]`."""
    width = module.width
    placed = list(zip(x_ND, position_N, strict=True))
    query = [heads_of(module.query, module.query_norm, x, width, p, theta) for x, p in placed]
    key = [heads_of(module.key, module.key_norm, x, width, p, theta) for x, p in placed]
    value = [heads_of(module.value, None, x, width) for x in x_ND]
    output = np.zeros_like(x_ND)
    for n in range(len(x_ND)):
        mixed = []
        for h in range(len(query[n])):
            g = h // (len(query[n]) // len(key[n]))
            score = [query[n][h] @ key[m][g] / np.sqrt(width) for m in seen_by[n]]
            chance = np.exp(np.array(score) - max(score))
            mixed.append(chance @ np.array([value[m][g] for m in seen_by[n]]) / chance.sum())
        output[n] = numpy(module.output.weight) @ np.concatenate(mixed)
    return output


def earlier(row_N, document_N, among):
    """For each token of `among`, those of `among` in its row and document up to itself."""
    return {
        n: [m for m in among if m <= n and (row_N[m], document_N[m]) == (row_N[n], document_N[n])]
        for n in among
    }


def best(scores: dict[int, float], count: int, preferred=frozenset()) -> list[int]:
    """The `count` highest; of equal ones those that are `preferred`, and then the earliest."""
    return sorted(scores, key=lambda n: (-round(scores[n], 9), n not in preferred))[:count]


def auxiliary(router, x):
    """a(x), Equation 3."""
    return sigmoid(numpy(router.output.weight) @ silu(numpy(router.hidden.weight) @ x))


def expert(group, number, x):
    """SwiGLU of one expert."""
    if hasattr(group, "gate"):
        gate, up, down = (numpy(part.weight).T for part in (group.gate, group.up, group.down))
    else:
        gate, up, down = (
            numpy(part)[number] for part in (group.gate_EDF, group.up_EDF, group.down_EFD)
        )
    return (silu(x @ gate) * (x @ up)) @ down


class Group(NamedTuple):
    """The experts of some modalities.

    Attributes:
        module: their weights.
        modalities: numbers of the modalities.
        room: how many tokens an expert takes of so many members; None: it has no limit, and a
            router's experts are chosen causally.
    """

    module: Any
    modalities: set[int]
    room: Callable[[int], int] | None = None


def groups_of(modules, configs, shares, names, how, met, token_fraction=1.0) -> list[Group]:
    """The groups of a layer that `met` tokens reach; by the recipe, `token_fraction` of all do."""

    def room_of(config):
        share = sum(shares[names.index(name)] for name in config.modalities)
        if config.experts == 1:
            share = min(1, share / token_fraction)
        if how == "causal" or (config.experts == 1 and len(config.modalities) == len(names)):
            return None
        if how == "actual":
            return lambda members: -(-members // config.experts)
        return lambda members: slots(share / config.experts, met)

    return [
        Group(module, {names.index(name) for name in config.modalities}, room_of(config))
        for module, config in zip(modules, configs, strict=True)
    ]


def feed_forward(groups, x_ND, modality_N, preferred=None):
    """Equation 1. A lone expert takes its members in order, as many as it has room for.

    Where scores tie, expert e of the i-th group with a router prefers the tokens of the set
    `preferred[i][e]`.
    """
    output, routers = np.zeros_like(x_ND), 0
    for group, modalities, room in groups:
        members = [n for n in range(len(x_ND)) if modality_N[n] in modalities]
        if not hasattr(group, "router"):
            for n in members[: None if room is None else room(len(members))]:
                output[n] += expert(group, 0, x_ND[n])
            continue
        for e, weight in enumerate(numpy(group.router.weight)):
            scores = {n: sigmoid(weight @ x_ND[n]) for n in members}
            if room is None:
                chosen = [n for n in members if auxiliary(group.auxiliary, x_ND[n])[e] > 0.5]
            else:
                first = preferred[routers][e] if preferred else frozenset()
                chosen = best(scores, room(len(members)), first)
            for n in chosen:
                output[n] += scores[n] * expert(group, e, x_ND[n])
        routers += 1
    return output


class Tokens(NamedTuple):
    """What is known of N tokens besides their content; row by row."""

    modality_N: np.ndarray
    row_N: np.ndarray
    document_N: np.ndarray
    position_N: np.ndarray

    def at(self, among: list[int]) -> "Tokens":
        return Tokens(*(part[among] for part in self))


def updates(layer, groups, x_ND, tokens, theta=10_000.0, preferred=None):
    """What attention and experts add to each token, Swin norm or pre-norm."""
    before, after = (lambda m, x: x, rms_norm) if layer.swin else (rms_norm, lambda m, x: x)
    seen = earlier(tokens.row_N, tokens.document_N, range(len(x_ND)))
    read = before(layer.attention_norm, x_ND)
    mixed = attention(layer.attention, read, tokens.position_N, seen, theta)
    attended = after(layer.attention_norm, mixed)
    h_ND = x_ND + attended
    read = before(layer.experts_norm, h_ND)
    fed = feed_forward(groups, read, tokens.modality_N, preferred)
    return attended + after(layer.experts_norm, fed)


def depth_layer(layer, groups, x_ND, chosen, score_N, tokens, theta=10_000.0, preferred=None):
    """METHOD §3: the chosen go through the layer among themselves, scaled; others stay."""
    among, output = sorted(chosen), x_ND.copy()
    if among:
        place = {n: k for k, n in enumerate(among)}
        preferred = [[{place[n] for n in taken} for taken in each] for each in preferred or ()]
        update = updates(layer, groups, x_ND[among], tokens.at(among), theta, preferred)
        output[among] += score_N[among, None] * update
    return output


def gate_choice(gate, config, x_ND, tokens, how, preferred=frozenset()):
    """The tokens that a gate lets through, and every token's score."""
    score_N = sigmoid(x_ND @ numpy(gate.router.weight)[0])
    real = [n for n in range(len(x_ND)) if tokens.modality_N[n] >= 0]
    if how == "causal":
        return [n for n in real if auxiliary(gate.auxiliary, x_ND[n])[0] > 0.5], score_N
    if config.scope == "batch":
        count = slots(config.capacity_factor, len(real) if how == "actual" else len(x_ND))
        return best({n: score_N[n] for n in real}, count, preferred), score_N
    chosen, rows = [], sorted(set(tokens.row_N))
    for row in rows:
        own = {n: score_N[n] for n in real if tokens.row_N[n] == row}
        chosen += best(own, slots(config.capacity_factor, len(x_ND) / len(rows)), preferred)
    return chosen, score_N


def model(transformer, ids_BS, documents_BS, positions_BS, how, choices=()):
    """Logits [N, V] of a whole model.

    Args:
        transformer: gives weights and configuration.
        ids_BS, documents_BS, positions_BS: the batch.
        how: `static`, `actual` or `causal`.
        choices: where scores tie, the tokens to prefer: for each router, layer by layer, experts
            before gate, and each of its experts, a set.
    """
    config, vocabulary = transformer.config, transformer.vocabulary
    rows, length = ids_BS.shape
    id_N = ids_BS.flatten()
    modality_N = np.where(id_N == vocabulary.padding, -1, vocabulary.modality_of_id[id_N])
    row_N = np.arange(rows * length) // length
    document_N = documents_BS.flatten() * (config.attention_mask == "document")
    tokens = Tokens(modality_N, row_N, document_N, positions_BS.flatten())
    x_ND = numpy(transformer.embedding.weight)[id_N]
    if config.tied_embeddings:
        x_ND = x_ND * np.sqrt(config.dim)
    routed, left = sum(group.experts > 1 for group in config.group_list), list(choices)
    for number, layer in enumerate(transformer.layers):
        assert layer.swin == (config.norm == "swin")
        preferred, left = left[:routed], left[routed:]
        rule = (config.group_list, transformer.shares, vocabulary.modalities, how)
        if number not in config.depth_layers:
            groups = groups_of(layer.experts.groups, *rule, len(x_ND))
            x_ND = x_ND + updates(layer, groups, x_ND, tokens, config.rope_theta, preferred)
            continue
        depth = config.depth_config
        (first,) = left.pop(0) if left else (frozenset(),)
        chosen, score_N = gate_choice(layer.depth, depth, x_ND, tokens, how, first)
        by_row = depth.scope == "sequence"
        met = (
            rows * slots(depth.capacity_factor, length)
            if by_row
            else slots(depth.capacity_factor, len(x_ND))
        )
        groups = groups_of(layer.experts.groups, *rule, met, depth.capacity_factor)
        x_ND = depth_layer(
            layer, groups, x_ND, chosen, score_N, tokens, config.rope_theta, preferred
        )
    return rms_norm(transformer.norm, x_ND) @ numpy(transformer.head.weight).T
