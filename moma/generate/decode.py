"""Decoding: one token at a time, each from what stands before it alone.

Shapes: see `model/layers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moma.errors import UserError
from moma.generate.grammar import Grammar, Mode
from moma.model.routing import Routing
from moma.model.transformer import Transformer
from moma.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn (Chameleon's defaults).

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: the draw is among the likeliest tokens that hold this much probability.
        seed: of the draws.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    mode: Mode,
    context: int,
    new_tokens: int,
    sampling: Sampling,
) -> list[list[int]]:
    """Continue prompts causally, side by side; an answer ends as its grammar says.

    Args:
        model: a model whose auxiliary routers are trained, or that has none.
        prompts: token ids, each opened by the vocabulary's `beginning`.
        mode: see `Grammar`.
        context: most tokens of prompt and answer together.
        new_tokens: most tokens of an answer.
        sampling: how tokens are drawn.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    _refuse_long(prompts, mode, context, model.vocabulary)
    rows = _Rows(model, prompts, mode, context, new_tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    active = list(range(len(prompts)))
    while active:
        logits_BV = rows.next_logits(active).masked_fill(~rows.allowed(active), -torch.inf)
        drawn_B = draw(logits_BV, sampling, generator).tolist()
        goes_on = [rows.append(row, token) for row, token in zip(active, drawn_B, strict=True)]
        active = [row for row, more in zip(active, goes_on, strict=True) if more]
    return rows.answers


def _refuse_long(
    prompts: Sequence[Sequence[int]], mode: Mode, context: int, vocabulary: Vocabulary
) -> None:
    longest = max(map(len, prompts))
    answer, what = (vocabulary.image_span, "the image") if mode == "image" else (1, "an answer")
    if longest > context - answer:
        raise UserError(
            f"the prompt has {longest} tokens, and the context of {context} has room for "
            f"{max(0, context - answer)} beside {what}; shorten it"
        )


class _Rows:
    """Prompts with what was answered so far, a row each.

    Attributes:
        answers: the new tokens of each row.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        mode: Mode,
        context: int,
        new_tokens: int,
    ):
        self._model, self._context, self._new_tokens = model, context, new_tokens
        self._device, padding = model.embedding.weight.device, model.vocabulary.padding
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._tokens_BS = torch.full((len(prompts), context), padding, device=self._device)
        self._grammars = [Grammar(model.vocabulary, mode) for _ in prompts]
        for row, prompt in enumerate(prompts):
            self._tokens_BS[row, : len(prompt)] = torch.tensor(list(prompt))
            for token in prompt:
                self._grammars[row].advance(token)
        self.answers: list[list[int]] = [[] for _ in prompts]

    def next_logits(self, active: list[int]) -> Tensor:
        """Logits of the next token of some rows, fp32 [B, V] on the host."""
        last_B = torch.from_numpy(self._lengths[active] - 1).to(self._device)
        width = int(self._lengths[active].max())
        # Padding on the right is invisible to what precedes it: attention and routing are causal.
        tokens_BS = self._tokens_BS[active, :width]
        logits_BSV = self._model(tokens_BS, routing=Routing(mode="causal")).logits_BSV
        return logits_BSV[torch.arange(len(active), device=self._device), last_B].float().cpu()

    def allowed(self, active: list[int]) -> Tensor:
        """What the grammar allows in the room that is left, boolean [B, V]."""
        masks = [self._grammars[row].allowed(self._room(row)) for row in active]
        return torch.from_numpy(np.stack(masks))

    def append(self, row: int, token: int) -> bool:
        """Take a token into a row; tells whether the row goes on."""
        self.answers[row].append(token)
        self._grammars[row].advance(token)
        self._tokens_BS[row, self._lengths[row]] = token
        self._lengths[row] += 1
        return self._room(row) > 0 and not self._grammars[row].ends_with(token)

    def _room(self, row: int) -> int:
        """Tokens that an answer may still take."""
        left = self._context - int(self._lengths[row])
        return min(left, self._new_tokens - len(self.answers[row]))


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token a row, int64 [B], by temperature and nucleus (arXiv 1904.09751)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    chances, order = (logits_BV / sampling.temperature).softmax(-1).sort(-1, descending=True)
    # A token stays if those before it hold less than top_p, so that the first one always does.
    before = chances.cumsum(-1) - chances
    chances = chances.masked_fill(before >= sampling.top_p, 0)
    picked = torch.multinomial(chances, 1, generator=generator)
    return order.gather(1, picked).squeeze(1)
