"""Causal decoding, one token at a time.

Shapes: see `model/layers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from moma.errors import UserError
from moma.generate.grammar import Grammar, Mode
from moma.model.routing import Routing
from moma.model.transformer import Transformer
from moma.vocabulary import Vocabulary

# Logits divided by numbers outside this range may overflow fp32.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-6, 1e30


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled (defaults: Chameleon's).

    Attributes:
        temperature: divisor of the logits; 0 selects the most likely token (greedy decoding).
        top_p: nucleus sampling: sample among the most likely tokens that together have at least
            this probability, in (0, 1].
        seed: seed of the generator, 0 to 2³² − 1.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name} {value!r}: must be a number")
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE:
            raise UserError(
                f"temperature {self.temperature}: must be 0 (greedy decoding), or finite, from "
                f"{_MIN_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: must be a whole number from 0 to {2**32 - 1}")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    mode: Mode,
    context: int,
    new_tokens: int,
    sampling: Sampling,
) -> list[list[int]]:
    """Continue prompts causally as one batch, each until its grammar ends it.

    Args:
        model: a model whose auxiliary routers are trained, or that has none.
        prompts: token ids, each starting with the vocabulary's `beginning`.
        context: maximum number of tokens of a prompt and its continuation.
        new_tokens: maximum number of tokens of a continuation, at least 1.
        sampling: how tokens are sampled.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: a prompt leaves no space for a continuation, or `new_tokens` is below 1.
    """
    if new_tokens < 1:
        raise UserError(f"new_tokens {new_tokens}: must be at least 1")
    _check_lengths(prompts, mode, context, model.vocabulary)
    generator = torch.Generator().manual_seed(sampling.seed)
    sequences = [
        _Sequence(prompt, Grammar(model.vocabulary, mode), min(context, len(prompt) + new_tokens))
        for prompt in prompts
    ]
    active = sequences
    while active:
        logits_BV = _next_logits(model, [sequence.tokens for sequence in active])
        allowed_BV = torch.from_numpy(np.stack([sequence.allowed() for sequence in active]))
        logits_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
        tokens = sample(logits_BV, sampling, generator).tolist()
        active = [each for each, token in zip(active, tokens, strict=True) if each.append(token)]
    return [each.tokens[len(prompt) :] for each, prompt in zip(sequences, prompts, strict=True)]


def _check_lengths(
    prompts: Sequence[Sequence[int]], mode: Mode, context: int, vocabulary: Vocabulary
) -> None:
    longest = max(map(len, prompts))
    needed, what = (vocabulary.image_span, "an image") if mode == "image" else (1, "an answer")
    if longest > context - needed:
        raise UserError(
            f"the prompt has {longest} tokens, but the context of {context} tokens leaves only "
            f"{max(0, context - needed)} for it besides {what}; shorten the prompt"
        )


class _Sequence:
    """A prompt and its continuation, of at most `limit` tokens together."""

    def __init__(self, prompt: Sequence[int], grammar: Grammar, limit: int):
        self.tokens, self._grammar, self._limit = list(prompt), grammar, limit
        for token in prompt:
            grammar.advance(token)

    def allowed(self) -> np.ndarray:
        """Return which tokens the grammar allows next, boolean [V]."""
        return self._grammar.allowed(self._limit - len(self.tokens))

    def append(self, token: int) -> bool:
        """Append a token; return whether the sequence continues."""
        self.tokens.append(token)
        self._grammar.advance(token)
        return len(self.tokens) < self._limit and not self._grammar.ends_with(token)


def _next_logits(model: Transformer, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of the token after each sequence, fp32 [B, V] on the CPU."""
    device, padding = model.embedding.weight.device, model.vocabulary.padding
    # Padding on the right does not affect earlier tokens: attention and routing are causal.
    tokens_BS = pad_sequence([torch.tensor(each) for each in sequences], True, padding)
    last_B = torch.tensor([len(each) - 1 for each in sequences], device=device)
    sequence_B = torch.arange(len(sequences), device=device)

    def last_logits(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        return functional.linear(hidden_BSD[sequence_B, last_B], weight_VD)

    output = model(tokens_BS.to(device), routing=Routing(mode="causal"), head=last_logits)
    return output.head.float().cpu()


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one token per sequence, int64 [B], by temperature and nucleus (arXiv 1904.09751)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV, order_BV = (logits_BV / float(sampling.temperature)).softmax(-1).sort(-1, True)
    # A token stays if those before it have less than top_p, so the first one always stays.
    before_BV = probability_BV.cumsum(-1) - probability_BV
    probability_BV = probability_BV.masked_fill(before_BV >= sampling.top_p, 0)
    index_B1 = torch.multinomial(probability_BV, 1, generator=generator)
    return order_BV.gather(1, index_B1).squeeze(1)
