"""The method in slow NumPy, float64, token by token (MoMa, Equations 1 to 4; Chameleon).

It uses only the weights and the configuration of the package, none of its functions.
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
    """A fraction of the tokens, rounded up; products such as 0.3 · 10 are not exact."""
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


def attention(module, x_ND, position_N, attended, theta=10_000.0):
    """Attention of every token n to the tokens `attended[n]`."""
    width = module.width
    tokens = list(zip(x_ND, position_N, strict=True))
    query = [heads_of(module.query, module.query_norm, x, width, p, theta) for x, p in tokens]
    key = [heads_of(module.key, module.key_norm, x, width, p, theta) for x, p in tokens]
    value = [heads_of(module.value, None, x, width) for x in x_ND]
    output = np.zeros_like(x_ND)
    for n in range(len(x_ND)):
        mixed = []
        for h in range(len(query[n])):
            g = h // (len(query[n]) // len(key[n]))
            score = [query[n][h] @ key[m][g] / np.sqrt(width) for m in attended[n]]
            weight = np.exp(np.array(score) - max(score))
            mixed.append(weight @ np.array([value[m][g] for m in attended[n]]) / weight.sum())
        output[n] = numpy(module.output.weight) @ np.concatenate(mixed)
    return output


def earlier(sequence_N, document_N, tokens):
    """For each of `tokens`, those of them in its sequence and document up to itself."""
    key = list(zip(sequence_N, document_N, strict=True))
    return {n: [m for m in tokens if m <= n and key[m] == key[n]] for n in tokens}


def best(scores: dict[int, float], count: int, preferred=frozenset()) -> list[int]:
    """The `count` highest; among equal ones, `preferred` ones first and then earlier ones."""
    return sorted(scores, key=lambda n: (-round(scores[n], 9), n not in preferred))[:count]


def auxiliary(router, x):
    """a(x), Equation 3."""
    return sigmoid(numpy(router.output.weight) @ silu(numpy(router.hidden.weight) @ x))


def expert(group, number, x):
    """SwiGLU of one expert."""
    if hasattr(group, "feed_forward"):
        linear = group.feed_forward
        gate, up, down = (numpy(part.weight).T for part in (linear.gate, linear.up, linear.down))
    else:
        stacks = (group.gate, group.up, group.down)
        gate, up, down = (np.split(numpy(stack), group.num_experts)[number] for stack in stacks)
    return (silu(x @ gate) * (x @ up)) @ down


class Group(NamedTuple):
    """A group of experts.

    Attributes:
        module: their weights.
        modalities: indices of the modalities.
        capacity: slots of an expert, given the number of eligible tokens; None: without a
            capacity, and with a router, causal routing.
    """

    module: Any
    modalities: set[int]
    capacity: Callable[[int], int] | None = None


def groups_of(modules, configs, shares, names, how, reached, token_fraction=1.0) -> list[Group]:
    """The groups of a layer that `reached` tokens reach, `token_fraction` of all tokens."""

    def capacity_of(config):
        share = sum(shares[names.index(name)] for name in config.modalities)
        if config.experts == 1:
            share = min(1, share / token_fraction)
        if how == "causal" or (config.experts == 1 and len(config.modalities) == len(names)):
            return None
        if how == "actual":
            return lambda eligible: -(-eligible // config.experts)
        return lambda eligible: slots(share / config.experts, reached)

    return [
        Group(module, {names.index(name) for name in config.modalities}, capacity_of(config))
        for module, config in zip(modules, configs, strict=True)
    ]


def feed_forward(groups, x_ND, modality_N, preferred=None):
    """Equation 1. A single expert processes the eligible tokens in order, up to its capacity.

    Where scores tie, expert e of the i-th group with a router prefers the tokens in
    `preferred[i][e]`.
    """
    output, routers = np.zeros_like(x_ND), 0
    for group, modalities, capacity in groups:
        eligible = [n for n in range(len(x_ND)) if modality_N[n] in modalities]
        if not hasattr(group, "router"):
            for n in eligible[: None if capacity is None else capacity(len(eligible))]:
                output[n] += expert(group, 0, x_ND[n])
            continue
        for e, weight in enumerate(numpy(group.router.weight)):
            scores = {n: sigmoid(weight @ x_ND[n]) for n in eligible}
            if capacity is None:
                selected = [n for n in eligible if auxiliary(group.auxiliary, x_ND[n])[e] > 0.5]
            else:
                first = preferred[routers][e] if preferred else frozenset()
                selected = best(scores, capacity(len(eligible)), first)
            for n in selected:
                output[n] += scores[n] * expert(group, e, x_ND[n])
        routers += 1
    return output


class Tokens(NamedTuple):
    """Properties of N tokens besides their ids, sequence by sequence."""

    modality_N: np.ndarray
    sequence_N: np.ndarray
    document_N: np.ndarray
    position_N: np.ndarray

    def select(self, tokens: list[int]) -> "Tokens":
        return Tokens(*(part[tokens] for part in self))


def updates(layer, groups, x_ND, tokens, theta=10_000.0, preferred=None):
    """What attention and experts add to each token, with Swin norm or pre-norm."""
    before, after = (lambda m, x: x, rms_norm) if layer.swin else (rms_norm, lambda m, x: x)
    attended = earlier(tokens.sequence_N, tokens.document_N, range(len(x_ND)))
    normed_ND = before(layer.attention_norm, x_ND)
    mixed_ND = attention(layer.attention, normed_ND, tokens.position_N, attended, theta)
    update_ND = after(layer.attention_norm, mixed_ND)
    normed_ND = before(layer.experts_norm, x_ND + update_ND)
    y_ND = feed_forward(groups, normed_ND, tokens.modality_N, preferred)
    return update_ND + after(layer.experts_norm, y_ND)


def depth_layer(layer, groups, x_ND, selected, score_N, tokens, theta=10_000.0, preferred=None):
    """Equation 2: the layer updates the selected tokens, which see only each other."""
    selected, output = sorted(selected), x_ND.copy()
    if selected:
        index = {n: k for k, n in enumerate(selected)}
        preferred = [[{index[n] for n in tied} for tied in each] for each in preferred or ()]
        own = tokens.select(selected)
        update = updates(layer, groups, x_ND[selected], own, theta, preferred)
        output[selected] += score_N[selected, None] * update
    return output


def depth_choice(router, config, x_ND, tokens, how, preferred=frozenset(), shares=()):
    """The tokens that a depth router selects, and every token's score."""
    score_N = sigmoid(x_ND @ numpy(router.router.weight)[0])
    real = [n for n in range(len(x_ND)) if tokens.modality_N[n] >= 0]
    if how == "causal":
        return [n for n in real if auxiliary(router.auxiliary, x_ND[n])[0] > 0.5], score_N
    if config.modality_factors is not None:
        selected = []
        for number, factor in enumerate(config.modality_factors.values()):
            own = {n: score_N[n] for n in real if tokens.modality_N[n] == number}
            count = len(own) if how == "actual" else shares[number] * len(x_ND)
            selected += best(own, slots(factor, count), preferred)
        return selected, score_N
    if config.scope == "batch":
        count = slots(config.capacity_factor, len(real) if how == "actual" else len(x_ND))
        return best({n: score_N[n] for n in real}, count, preferred), score_N
    selected, sequences = [], sorted(set(tokens.sequence_N))
    count = slots(config.capacity_factor, len(x_ND) / len(sequences))
    for sequence in sequences:
        own = {n: score_N[n] for n in real if tokens.sequence_N[n] == sequence}
        selected += best(own, count, preferred)
    return selected, score_N


def slots_by_modality(transformer, depth, tokens):
    """Each modality's share of the slots of a depth router by modality, and how many it has."""
    factors = [depth.modality_factors[name] for name in transformer.vocabulary.modalities]
    parts = [share * each for share, each in zip(transformer.shares, factors, strict=True)]
    # Rounded up, the slots of all modalities may be more than the tokens.
    return np.array(parts) / sum(parts), min(sum(slots(part, tokens) for part in parts), tokens)


def model(transformer, ids_BS, document_ids_BS, positions_BS, how, choices=()):
    """Logits [N, V] of a whole model.

    Args:
        transformer: gives weights and configuration.
        ids_BS, document_ids_BS, positions_BS: the batch.
        how: `static`, `actual` or `causal`.
        choices: where scores tie, the tokens to prefer: a set for each expert of each router,
            layer by layer, those of experts before the depth router.
    """
    config, vocabulary = transformer.config, transformer.vocabulary
    sequences, length = ids_BS.shape
    id_N = ids_BS.flatten()
    modality_N = np.where(id_N == vocabulary.padding, -1, vocabulary.modality_of_id[id_N])
    sequence_N = np.arange(sequences * length) // length
    document_N = document_ids_BS.flatten() * (config.attention_mask == "document")
    tokens = Tokens(modality_N, sequence_N, document_N, positions_BS.flatten())
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
        selected, score_N = depth_choice(
            layer.depth, depth, x_ND, tokens, how, first, transformer.shares
        )
        shares, fraction = transformer.shares, depth.capacity_factor
        pools = sequences if depth.scope == "sequence" else 1
        reached = pools * slots(fraction, len(x_ND) // pools)
        if depth.modality_factors is not None:
            shares, reached = slots_by_modality(transformer, depth, len(x_ND))
            fraction = 1.0
        rule = (config.group_list, shares, vocabulary.modalities, how)
        groups = groups_of(layer.experts.groups, *rule, reached, fraction)
        x_ND = depth_layer(
            layer, groups, x_ND, selected, score_N, tokens, config.rope_theta, preferred
        )
    return rms_norm(transformer.norm, x_ND) @ numpy(transformer.head.weight).T
