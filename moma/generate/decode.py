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
    longest = max(map(len, prompts))
    needed = longest + (model.vocabulary.image_span if mode == "image" else 1)
    if needed > context:
        raise UserError(
            f"the prompt has {longest} tokens; with its answer that is more than the context of "
            f"{context}; shorten it"
        )
    device = model.embedding.weight.device
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens_BS = torch.full((len(prompts), context), model.vocabulary.padding, device=device)
    grammars = [Grammar(model.vocabulary, mode) for _ in prompts]
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = torch.tensor(list(prompt))
        for token in prompt:
            grammars[row].advance(token)
    answers: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(sampling.seed)
    active = list(range(len(prompts)))
    while active:
        last_B = torch.from_numpy(lengths[active] - 1).to(device)
        width = int(lengths[active].max())
        # Padding on the right is invisible to what precedes it: attention and routing are causal.
        logits_BSV = model(tokens_BS[active, :width], routing=Routing(by="causal")).logits_BSV
        logits_BV = logits_BSV[torch.arange(len(active), device=device), last_B].float().cpu()
        room = [min(context - lengths[row], new_tokens - len(answers[row])) for row in active]
        allowed_BV = torch.from_numpy(
            np.stack([grammars[row].allowed(left) for row, left in zip(active, room, strict=True)])
        )
        drawn_B = draw(logits_BV.masked_fill(~allowed_BV, -torch.inf), sampling, generator)
        for row, token in zip(list(active), drawn_B.tolist(), strict=True):
            answers[row].append(token)
            grammars[row].advance(token)
            tokens_BS[row, lengths[row]] = token
            lengths[row] += 1
            full = lengths[row] >= context or len(answers[row]) >= new_tokens
            if full or grammars[row].ends_with(token):
                active.remove(row)
    return answers


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
