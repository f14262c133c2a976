"""The method in slow NumPy, float64, token by token (METHOD: Eq. 1 to 4 of MoMa; Chameleon).

Nothing here is shared with the package but the weights.
"""

import numpy as np


def numpy(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def rms_norm(norm, x):
    return x / np.sqrt((x**2).mean() + norm.eps) * numpy(norm.weight)


def head_of(linear, norm, x, position, head, width, theta):
    """One head's query or key (with a norm and rotation) or value (without), [C]."""
    value = (numpy(linear.weight) @ x).reshape(-1, width)[head]
    if position is None:
        return value
    if hasattr(norm, "weight"):
        value = (value - value.mean()) / np.sqrt(value.var() + 1e-5)
        value = value * numpy(norm.weight)[head] + numpy(norm.bias)[head]
    half, rotated = width // 2, np.empty(width)
    for pair in range(half):
        angle = position * theta ** (-2 * pair / width)
        a, b = value[pair], value[pair + half]
        rotated[pair] = a * np.cos(angle) - b * np.sin(angle)
        rotated[pair + half] = b * np.cos(angle) + a * np.sin(angle)
    return rotated


def attention(module, x_ND, position_N, seen_by, theta=10_000.0):
    """Attention of every token n over the tokens `seen_by[n]`."""
    width, keys = module.width, module.key.weight.shape[0] // module.width
    heads = module.query.weight.shape[0] // width
    output = np.zeros_like(x_ND)
    for n in range(len(x_ND)):
        mixed = []
        for h in range(heads):
            g = h // (heads // keys)
            query = head_of(
                module.query, module.query_norm, x_ND[n], position_N[n], h, width, theta
            )
            key = [
                head_of(module.key, module.key_norm, x_ND[m], position_N[m], g, width, theta)
                for m in seen_by[n]
            ]
            value = [
                head_of(module.value, None, x_ND[m], None, g, width, theta) for m in seen_by[n]
            ]
            chance = np.exp([query @ k / np.sqrt(width) for k in key])
            mixed.append(chance @ np.array(value) / chance.sum())
        output[n] = numpy(module.output.weight) @ np.concatenate(mixed)
    return output


def earlier(row_N, document_N, among):
    """For each token of `among`, those of `among` in its row and document up to itself."""
    return {
        n: [m for m in among if m <= n and (row_N[m], document_N[m]) == (row_N[n], document_N[n])]
        for n in among
    }


def best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda n: -scores[n])[:count]


def auxiliary(router, x):
    """a(x), Equation 3."""
    return sigmoid(numpy(router.output.weight) @ silu(numpy(router.hidden.weight) @ x))


def expert(group, number, x):
    if hasattr(group, "gate"):
        gate, up, down = (numpy(part.weight).T for part in (group.gate, group.up, group.down))
    else:
        gate, up, down = (
            numpy(part)[number] for part in (group.gate_EDF, group.up_EDF, group.down_EFD)
        )
    return (silu(x @ gate) * (x @ up)) @ down


def feed_forward(experts, x_ND, modality_N, capacity_of=None):
    """Equation 1; `capacity_of(group, members)` tells batch choice's k, None routes causally.

    A lone expert takes its members in order, as many as it has room for.
    """
    output = np.zeros_like(x_ND)
    for group in experts.groups:
        taken = getattr(group, "modalities", None)
        members = [n for n in range(len(x_ND)) if taken is None or modality_N[n] in taken]
        if not hasattr(group, "router"):
            room = (
                None if capacity_of is None or taken is None else capacity_of(group, len(members))
            )
            for n in members[:room]:
                output[n] += expert(group, 0, x_ND[n])
            continue
        for e, weight in enumerate(numpy(group.router.weight)):
            scores = {n: sigmoid(weight @ x_ND[n]) for n in members}
            if capacity_of is None:
                chosen = [n for n in members if auxiliary(group.auxiliary, x_ND[n])[e] > 0.5]
            else:
                chosen = best(scores, capacity_of(group, len(members)))
            for n in chosen:
                output[n] += scores[n] * expert(group, e, x_ND[n])
    return output


def updates(layer, x_ND, modality_N, position_N, seen_by, capacity_of):
    """What attention and experts add to each token, Swin norm or pre-norm."""

    def norm(module, x):
        return np.array([rms_norm(module, row) for row in x]).reshape(x.shape)

    before, after = (lambda m, x: x, norm) if layer.swin else (norm, lambda m, x: x)
    read = before(layer.attention_norm, x_ND)
    attended = after(layer.attention_norm, attention(layer.attention, read, position_N, seen_by))
    h_ND = x_ND + attended
    read = before(layer.experts_norm, h_ND)
    fed = after(layer.experts_norm, feed_forward(layer.experts, read, modality_N, capacity_of))
    return attended + fed


def depth_layer(layer, x_ND, chosen, score_N, modality_N, row_N, document_N, position_N, capacity):
    """METHOD §3: the chosen go through the layer among themselves, scaled; others stay."""
    among = sorted(chosen)
    place = {n: k for k, n in enumerate(among)}
    seen = earlier(row_N, document_N, among)
    update = updates(
        layer,
        x_ND[among],
        modality_N[among],
        position_N[among],
        [[place[m] for m in seen[n]] for n in among],
        capacity,
    )
    output = x_ND.copy()
    for n in among:
        output[n] = x_ND[n] + score_N[n] * update[place[n]]
    return output
