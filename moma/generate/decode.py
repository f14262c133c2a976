"""Causal decoding of several sequences at once, with cached keys and values.

A pass appends each sequence's newest tokens to the caches and samples the next one. Inside an
image, a pass may also check drafts of the following codes (speculative Jacobi decoding, arXiv
2410.01699): the drafts are the samples of the pass before, for the same positions. Because noise is
tied to positions (`sampling.py`; coupled drafts, arXiv 2510.24211), a draft is right if and only if
it equals the sample, so the result is the one without drafts.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moma.errors import UserError
from moma.generate.grammar import Mode
from moma.generate.predictor import Predictor
from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, GeneratedSequence, Options, Request
from moma.model.caches import Caches
from moma.model.transformer import Transformer


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    mode: Mode,
    context: int,
    new_tokens: int,
    sampling: Sampling,
) -> list[list[int]]:
    """Continue prompts, each until its grammar ends it, and return the new tokens of each.

    See `Options`; prompt number i is sampled with the seed `sampling.seed` + i.
    """
    requests = [Request([Branch(p)], sampling.seed + number) for number, p in enumerate(prompts)]
    answers: list[list[int]] = [[] for _ in prompts]
    for number, tokens in decode(model, requests, Options(mode, context, new_tokens, sampling)):
        answers[number] += tokens
    return answers


@torch.no_grad()
def decode(
    model: Transformer, requests: Sequence[Request], options: Options
) -> Iterator[tuple[int, list[int]]]:
    """Generate sequences together, and yield each one's new tokens as they come.

    Args:
        model: a model that can route causally.
        requests: what to generate.
        options: how.

    Yields:
        The number of a request, and its next tokens.

    Raises:
        UserError: a prompt leaves no space for a continuation.
    """
    _check_lengths(model, requests, options)
    predictor = Predictor(model, options)
    sequences = [
        GeneratedSequence(number, each, model.vocabulary, options)
        for number, each in enumerate(requests)
    ]
    yield from ((each.number, each.take_new()) for each in sequences if each.has_new)
    active = [each for each in sequences if not each.is_complete]
    caches = model.new_caches(sum(len(each.feeds) for each in active))
    while active:
        hidden_BSD = _run(model, [feed for each in active for feed in each.feeds], caches)
        predictor.append_samples(active, hidden_BSD)
        if options.drafts:
            caches.keep([count for each in active for count in each.kept])
        for each in active:
            yield each.number, each.take_new()
        if any(each.is_complete for each in active):
            unfinished = [not each.is_complete for each in active for _ in each.feeds]
            caches.select([row for row, keeps in enumerate(unfinished) if keeps])
            active = [each for each in active if not each.is_complete]


def _run(model: Transformer, feeds: Sequence[Sequence[int]], caches: Caches) -> Tensor:
    """Append tokens to the sequences in the caches and return their hidden vectors, [B, S, D]."""
    tokens_BS = pad_sequence([torch.tensor(each) for each in feeds], True, model.vocabulary.padding)
    output = model(
        tokens_BS.to(model.embedding.weight.device),
        routing=model.named_routing("causal"),
        head=_in_product_dtype,
        caches=caches,
    )
    return output.head


def _in_product_dtype(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    """A head that returns the hidden vectors in the dtype of matrix products."""
    device = hidden_BSD.device.type
    enabled = torch.is_autocast_enabled(device)
    return hidden_BSD.to(torch.get_autocast_dtype(device)) if enabled else hidden_BSD


def _check_lengths(model: Transformer, requests: Sequence[Request], options: Options) -> None:
    longest = max(len(branch.prompt) for request in requests for branch in request.branches)
    needed, what = (1, "an answer")
    if options.mode == "image":
        needed = options.images * model.vocabulary.image_span
        what = "an image" if options.images == 1 else f"{options.images} images"
    if longest > options.context - needed:
        raise UserError(
            f"the prompt has {longest} tokens, but the context of {options.context} tokens leaves "
            f"only {max(0, options.context - needed)} for it besides {what}; shorten the prompt"
        )
