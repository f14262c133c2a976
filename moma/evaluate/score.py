"""Log-likelihoods of tokens given those before them: what all evaluations of a model compute.

Shapes: see `model/layers.py`; T scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moma.data.batches.packing import NO_LABEL
from moma.model.routing import Routing, RoutingName
from moma.model.transformer import Transformer
from moma.train.cross_entropy import TokenLosses, linear_cross_entropy
from moma.vocabulary import Vocabulary


class ScoredSequence(NamedTuple):
    """A sequence of which some tokens are scored.

    Attributes:
        ids: int64 of shape [S].
        is_scored: booleans of shape [S]; the first token cannot be scored.
    """

    ids: np.ndarray
    is_scored: np.ndarray


class TokenScores(NamedTuple):
    """Scores of the scored tokens of a sequence.

    Attributes:
        log_likelihood_T: in nats, float64.
    """

    log_likelihood_T: np.ndarray
    is_top_T: np.ndarray


# Scores sequences as `score` does; the model and its routing are given.
Score = Callable[[Sequence[ScoredSequence]], list[TokenScores]]


def with_target(
    prompt: Sequence[int] | np.ndarray, target: Sequence[int] | np.ndarray
) -> ScoredSequence:
    """A sequence of a prompt, which is not scored, and a target, which is."""
    ids = np.array([*prompt, *target], dtype=np.int64)
    return ScoredSequence(ids, np.arange(len(ids)) >= len(prompt))


@torch.no_grad()
def score(
    model: Transformer,
    sequences: Sequence[ScoredSequence],
    max_tokens: int,
    routing: RoutingName = "causal",
) -> list[TokenScores]:
    """Score tokens of sequences, batched by length; equal sequences are scored once.

    Under causal routing a score does not depend on the other sequences, as it does under `choice`.

    Args:
        model: the model, in evaluation mode.
        max_tokens: maximum number of tokens of a batch, padding included, which bounds the memory;
            a longer sequence is a batch of its own.
        routing: see `Transformer.named_routing`.

    Returns:
        The scores of each sequence, in order.
    """
    policy = model.named_routing(routing)
    keys = [(ids.tobytes(), is_scored.tobytes()) for ids, is_scored in sequences]
    unique = dict(zip(keys, sequences, strict=True))
    scores = dict.fromkeys(keys, TokenScores(np.empty(0), np.empty(0, bool)))
    rest = [key for key, each in unique.items() if each.is_scored.any()]
    rest.sort(key=lambda key: len(unique[key].ids), reverse=True)
    while rest:
        count = max(1, max_tokens // (len(unique[rest[0]].ids) - 1))
        batch, rest = rest[:count], rest[count:]
        found = _score_batch(model, [unique[key] for key in batch], policy)
        scores.update(zip(batch, found, strict=True))
    return [scores[key] for key in keys]


def _score_batch(
    model: Transformer, sequences: Sequence[ScoredSequence], routing: Routing
) -> list[TokenScores]:
    device = model.embedding.weight.device
    inputs = [torch.from_numpy(each.ids[:-1]) for each in sequences]
    labels = [
        torch.from_numpy(np.where(each.is_scored, each.ids, NO_LABEL)[1:]) for each in sequences
    ]
    tokens_BS = pad_sequence(inputs, True, model.vocabulary.padding).to(device)
    labels_N = pad_sequence(labels, True, NO_LABEL).flatten().to(device)

    def head(hidden_BSD: Tensor, weight_VD: Tensor) -> TokenLosses:
        has_label_N = labels_N != NO_LABEL
        hidden_TD = hidden_BSD.flatten(0, 1)[has_label_N]
        return linear_cross_entropy(hidden_TD, weight_VD, labels_N[has_label_N], z_loss=0.0)[1]

    losses = model(tokens_BS, routing=routing, head=head).head
    counts = np.cumsum([each.is_scored.sum() for each in sequences])[:-1]
    log_likelihoods = np.split(-losses.loss_N.double().cpu().numpy(), counts)
    are_top = np.split(losses.correct_N.cpu().numpy() > 0, counts)
    return list(map(TokenScores, log_likelihoods, are_top))


def windows(ids: np.ndarray, context: int, vocabulary: Vocabulary) -> list[ScoredSequence]:
    """Cut a document into windows that the model can read: each token but the first is scored once.

    A window begins with the last token of the one before it, and not inside an image.

    Args:
        ids: integers of shape [tokens].
        context: maximum number of tokens that the model reads at once.
    """
    ids = ids.astype(np.int64)
    images = np.flatnonzero(ids == vocabulary.begin_image)
    last = vocabulary.image_span - 1  # offset of an image's last token
    found, start = [], 0
    while start < len(ids) - 1:
        stop = min(start + context, len(ids) - 1)
        cut = images[(images > start) & (images < stop) & (stop < images + last)]
        if len(cut) and stop < len(ids) - 1:
            stop = int(cut[-1])
        found.append(with_target(ids[start : start + 1], ids[start + 1 : stop + 1]))
        start = stop
    return found
