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

from moma.errors import UserError
from moma.generate.grammar import Mode
from moma.generate.predictor import Predictor
from moma.generate.sequence import DRAFTS, End, GeneratedSequence, Request
from moma.model.caches import Caches
from moma.model.layers import product_dtype
from moma.model.transformer import Transformer
from moma.vocabulary import Vocabulary


class NewTokens(NamedTuple):
    """The next tokens of a request.

    Attributes:
        tokens: ids; there may be none.
        end: why the request is complete, or what made it fail; None: it goes on.
    """

    number: int
    tokens: list[int]
    end: End | UserError | None


class Decoder:
    """Generates several sequences together; each may begin and end at any time.

    Args:
        model: a model that can route causally.
    """

    def __init__(self, model: Transformer):
        self._model, self._predictor = model, Predictor(model)
        self._drafts_alone = drafts_alone(model)
        self._added: list[GeneratedSequence] = []
        self._active: list[GeneratedSequence] = []
        self._caches = model.new_caches(0)

    def __len__(self) -> int:
        """Number of requests that are not complete."""
        return len(self._added) + len(self._active)

    def add(self, number: int, request: Request) -> None:
        """Generate a request from the next step on, under a number that no other one has.

        Raises:
            UserError: its prompt leaves no space for a continuation.
        """
        longest, options = max(len(branch.prompt) for branch in request.branches), request.options
        vocabulary = self._model.vocabulary
        require_space(longest, vocabulary, options.mode, options.context, options.images)
        self._added.append(GeneratedSequence(number, request, vocabulary))

    def cancel(self, number: int) -> None:
        """Forget a request; without effect if there is none of this number."""
        self._added = [each for each in self._added if each.number != number]
        self._keep([each for each in self._active if each.number != number])

    @torch.inference_mode()
    def step(self) -> list[NewTokens]:
        """Append at least one token to every sequence, and return the new tokens of each."""
        # A sequence may consist of tokens for which there is no choice.
        begun = [each for each in self._added if each.end is None]
        changed, self._added = [*self._active, *self._added], []
        rows = sum(len(each.inputs) for each in changed)
        for each in (*self._active, *begun):
            each.default_drafts = self._drafts_alone if rows == 1 else 0
        # Prompts are not padded to each other's length together with single tokens.
        if self._active:
            self._advance(self._active, self._caches)
        if begun:
            caches = self._model.new_caches(sum(len(each.inputs) for each in begun))
            self._advance(begun, caches)
            self._caches.extend(caches)
            self._active = self._active + begun
        self._keep([each for each in self._active if each.end is None])
        return [NewTokens(each.number, each.take_new(), each.end) for each in changed]

    def _advance(self, sequences: Sequence[GeneratedSequence], caches: Caches) -> None:
        """Append the next tokens of sequences."""
        hidden_BSD = _run(
            self._model, [input_ids for each in sequences for input_ids in each.inputs], caches
        )
        self._predictor.append_samples(sequences, hidden_BSD)
        if any(each.drafted for each in sequences):
            caches.keep([count for each in sequences for count in each.kept])

    def _keep(self, kept: list[GeneratedSequence]) -> None:
        """Forget all other sequences and their keys and values."""
        if len(kept) == len(self._active):
            return
        if kept:
            keeps = [each in kept for each in self._active for _ in each.inputs]
            self._caches.select([row for row, keep in enumerate(keeps) if keep])
        else:
            self._caches = self._model.new_caches(0)
        self._active = kept


def drafts_alone(model: Transformer) -> int:
    """The drafts that a sequence has by default while it is alone.

    None if its tokens choose experts or layers on a CPU: a pass with drafts reads the weights that
    any of them uses (docs/results/generate.md).
    """
    reads_more = model.head.weight.device.type == "cpu" and model.config.is_routed
    return 0 if reads_more else DRAFTS


def decode(
    model: Transformer, requests: Iterable[tuple[int, Request]], batch: int | None = None
) -> Iterator[NewTokens]:
    """Generate sequences together, and yield each one's new tokens as they come.

    Args:
        model: a model that can route causally.
        requests: what to generate, by numbers; the next one is taken when a sequence is complete
            (continuous batching).
        batch: maximum number of requests at a time; None: all.

    Raises:
        UserError: a prompt leaves no space for a continuation, or logits are NaN or infinite.
    """
    decoder, queue = Decoder(model), iter(requests)
    while True:
        for number, request in islice(queue, None if batch is None else batch - len(decoder)):
            decoder.add(number, request)
        if not len(decoder):
            return
        for new in decoder.step():
            if isinstance(new.end, UserError):
                raise new.end
            yield new


def _run(model: Transformer, inputs: Sequence[Sequence[int]], caches: Caches) -> Tensor:
    """Append tokens to the sequences in the caches and return their hidden vectors, [B, S, D]."""
    size, padding = max(map(len, inputs)), model.vocabulary.padding
    tokens_BS = torch.tensor([[*each, *[padding] * (size - len(each))] for each in inputs])
    output = model(
        tokens_BS.to(model.embedding.weight.device),
        routing=model.named_routing("causal", raises=False, checks=False),
        head=lambda hidden_BSD, _: hidden_BSD.to(product_dtype(hidden_BSD)),
        caches=caches,
    )
    return output.head


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
