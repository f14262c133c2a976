"""Causal decoding of several sequences at once, with cached keys and values.

A pass appends each sequence's newest tokens to the caches and samples the next one. Inside an
image, a pass may also check drafts of the following codes (speculative Jacobi decoding, arXiv
2410.01699): the drafts are the samples of the pass before, for the same positions. Because noise is
tied to positions (`sampling.py`; coupled drafts, arXiv 2510.24211), a draft is right if and only if
it equals the sample, so the result is the one without drafts.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moma.errors import UserError
from moma.generate.grammar import Mode
from moma.generate.predictor import Predictor
from moma.generate.sequence import GeneratedSequence, Options, Request
from moma.model.caches import Caches
from moma.model.transformer import Transformer
from moma.vocabulary import Vocabulary


class NewTokens(NamedTuple):
    """The next tokens of a request.

    Attributes:
        number: number of the request, from 0.
        tokens: ids; there may be none.
        is_last: whether the request is complete.
    """

    number: int
    tokens: list[int]
    is_last: bool


@torch.no_grad()
def decode(
    model: Transformer,
    requests: Iterable[Request],
    options: Options,
    batch: int | None = None,
) -> Iterator[NewTokens]:
    """Generate sequences together, and yield each one's new tokens as they come.

    Args:
        model: a model that can route causally.
        requests: what to generate; the next one is taken when a sequence is complete (continuous
            batching).
        options: how.
        batch: maximum number of requests at a time; None: all.

    Raises:
        UserError: a prompt leaves no space for a continuation.
    """
    predictor = Predictor(model, options)
    numbered = enumerate(requests)
    active: list[GeneratedSequence] = []
    caches = model.new_caches(0)
    while True:
        free = None if batch is None else batch - len(active)
        taken = list(islice(numbered, free))
        for _, request in taken:
            longest = max(len(branch.prompt) for branch in request.branches)
            require_space(longest, model.vocabulary, options.mode, options.context, options.images)
        added = [
            GeneratedSequence(number, request, model.vocabulary, options)
            for number, request in taken
        ]
        yield from _new_tokens(each for each in added if each.has_new)
        added = [each for each in added if not each.is_complete]
        if not (active or added):
            return
        # Prompts are not padded to each other's length together with single tokens.
        added_caches = model.new_caches(sum(len(each.feeds) for each in added))
        for sequences, own in ((active, caches), (added, added_caches)):
            if sequences:
                _advance(model, predictor, sequences, own, options)
                yield from _new_tokens(sequences)
        if added:
            caches.extend(added_caches)
            active += added
        if any(each.is_complete for each in active):
            unfinished = [not each.is_complete for each in active for _ in each.feeds]
            caches.select([row for row, keeps in enumerate(unfinished) if keeps])
            active = [each for each in active if not each.is_complete]


def _new_tokens(sequences: Iterable[GeneratedSequence]) -> Iterator[NewTokens]:
    return (NewTokens(each.number, each.take_new(), each.is_complete) for each in sequences)


def _advance(
    model: Transformer,
    predictor: Predictor,
    sequences: Sequence[GeneratedSequence],
    caches: Caches,
    options: Options,
) -> None:
    """Append the next tokens of sequences."""
    hidden_BSD = _run(model, [feed for each in sequences for feed in each.feeds], caches)
    predictor.append_samples(sequences, hidden_BSD)
    if any(each.drafted for each in sequences):
        caches.keep([count for each in sequences for count in each.kept])


def _run(model: Transformer, feeds: Sequence[Sequence[int]], caches: Caches) -> Tensor:
    """Append tokens to the sequences in the caches and return their hidden vectors, [B, S, D]."""
    tokens_BS = pad_sequence([torch.tensor(each) for each in feeds], True, model.vocabulary.padding)
    output = model(
        tokens_BS.to(model.embedding.weight.device),
        routing=model.named_routing("causal", raises=False, checks=False),
        head=_in_product_dtype,
        caches=caches,
    )
    return output.head


def _in_product_dtype(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    """A head that returns the hidden vectors in the dtype of matrix products."""
    device = hidden_BSD.device.type
    enabled = torch.is_autocast_enabled(device)
    return hidden_BSD.to(torch.get_autocast_dtype(device)) if enabled else hidden_BSD


def require_space(
    tokens: int, vocabulary: Vocabulary, mode: Mode, context: int, images: int = 1
) -> None:
    """Check that a prompt of a number of tokens leaves space for a continuation; see `Options`.

    Raises:
        UserError: it does not.
    """
    needed, what = (1, "an answer")
    if mode == "image":
        needed = images * vocabulary.image_span
        what = "an image" if images == 1 else f"{images} images"
    if tokens > context - needed:
        raise UserError(
            f"the prompt has {tokens} tokens, but the context of {context} tokens leaves "
            f"only {max(0, context - needed)} for it besides {what}; shorten the prompt"
        )
