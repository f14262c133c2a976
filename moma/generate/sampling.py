"""Sampling of the next token.

Logits are changed by the processors of `transformers` (temperature, top-k, min-p, repetition
penalty). A token is then sampled as the argmax of logits plus Gumbel noise, which samples from
their softmax (Gumbel 1954). The noise depends only on a sequence's seed and the position, so a
sequence does not depend on its neighbors, nor on how many positions are computed at once. Nucleus
sampling checks the argmax instead of sorting all tokens, and takes the next one if it is outside.

Shapes: V allowed ids, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moma.errors import UserError

# Logits divided by numbers outside this range may overflow fp32.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-6, 1e30
_MIN_TOP_P = 1e-6  # fp32 may round smaller numbers to 0, and then no token is in the nucleus
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled (defaults: Chameleon's).

    Attributes:
        temperature: divisor of the logits; 0 selects the most likely token (greedy decoding).
        top_p: nucleus sampling: sample among the most likely tokens that together have at least
            this probability, from 1e-6 to 1 (arXiv 1904.09751).
        seed: seed of the noise, 0 to 2³² − 1.
        top_k: sample among this many most likely tokens; 0: all.
        min_p: sample among tokens with at least this fraction of the highest probability, in
            [0, 1] (arXiv 2407.01082).
        repetition_penalty: divisor of the positive logits of tokens that occurred in the sequence;
            negative ones are multiplied (arXiv 1909.05858); 1: none.

    Raises:
        UserError: a value is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name} {value!r}: must be a number")
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE:
            raise UserError(
                f"temperature {self.temperature}: must be 0 (greedy decoding), or finite, from "
                f"{_MIN_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}"
            )
        if not _MIN_TOP_P <= self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be from {_MIN_TOP_P:g} to 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed {self.seed}: must be a whole number from 0 to {MAX_SEED}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be a whole number, at least 0")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p}: must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(
                f"repetition_penalty {self.repetition_penalty}: must be from 0.01 to 100"
            )


Processor = Callable[[Any, Any], Any]


class Sampler:
    """Samples tokens as `sampling` says."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._penalty, self._processors, self._min_p = _processors(sampling)

    def __call__(
        self, logits_TV: Tensor, noise_TV: Tensor | None, history_T: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Sample one token per position, int64 [T], as an index into the allowed ids.

        Args:
            logits_TV: fp32; −∞ where an id is not allowed.
            noise_TV: see `gumbel_noise`; not needed if the temperature is 0.
            history_T: indices of ids that occurred before each position; needed only for a
                repetition penalty.
        """
        if self._penalty is not None:
            assert history_T is not None
            parts = zip(history_T, logits_TV.split(1), strict=True)
            logits_TV = torch.cat([self._penalty(index[None], row) for index, row in parts])
        if self.sampling.temperature == 0:
            return _argmax(logits_TV)
        for processor in self._processors:
            logits_TV = processor(None, logits_TV)
        assert noise_TV is not None
        kept_TV = logits_TV if self._min_p is None else self._min_p(None, logits_TV)
        noisy_TV = kept_TV + noise_TV
        if self.sampling.top_p == 1:
            return _argmax(noisy_TV)
        find = argmax_in_nucleus if logits_TV.device.type != "cpu" else argmax_in_nucleus_on_cpu
        return find(noisy_TV, logits_TV, self.sampling.top_p)


def sampler_of(sampling: Sampling) -> Sampler:
    """Return the sampler of `sampling`: the same one for all that differ only in their seeds."""
    return _sampler(replace(sampling, seed=0))


@lru_cache(256)
def _sampler(sampling: Sampling) -> Sampler:
    return Sampler(sampling)


def argmax_in_nucleus(noisy_TV: Tensor, logits_TV: Tensor, top_p: float) -> Tensor:
    """The argmax of `noisy_TV` over each row's nucleus, [T].

    A token is in the nucleus if all more likely ones together have a probability below `top_p`; of
    equally likely ones the lower index counts as more likely, as in greedy decoding.
    """
    probability_TV = logits_TV.softmax(-1)
    ids_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    while True:
        index_T1 = noisy_TV.argmax(-1, keepdim=True)
        logit_T1 = logits_TV.gather(1, index_T1)
        is_likelier_TV = (logits_TV > logit_T1) | ((logits_TV == logit_T1) & (ids_V < index_T1))
        is_outside_T1 = (probability_TV * is_likelier_TV).sum(-1, keepdim=True) >= top_p
        if not bool(is_outside_T1.any()):
            return index_T1[:, 0]
        # Less likely tokens are outside, too.
        noisy_TV = noisy_TV.masked_fill(is_outside_T1 & ~is_likelier_TV, -torch.inf)


def argmax_in_nucleus_on_cpu(noisy_TV: Tensor, logits_TV: Tensor, top_p: float) -> Tensor:
    """See `argmax_in_nucleus`; NumPy compares and searches several times as fast as PyTorch."""
    rows = zip(noisy_TV.numpy(), logits_TV.numpy(), logits_TV.softmax(-1).numpy(), strict=True)
    return torch.tensor([_index_in_nucleus(*row, top_p) for row in rows])


def _index_in_nucleus(
    noisy_V: np.ndarray, logits_V: np.ndarray, probability_V: np.ndarray, top_p: float
) -> int:
    while True:
        index = int(noisy_V.argmax())
        is_likelier_V = logits_V > logits_V[index]
        is_likelier_V[:index] |= logits_V[:index] == logits_V[index]
        if not (probability_V @ is_likelier_V >= top_p):  # NaN ends the search, too
            return index
        noisy_V = np.where(is_likelier_V, noisy_V, -np.inf)


def _argmax(x_TV: Tensor) -> Tensor:
    """The first argmax of each row, [T]."""
    if x_TV.device.type == "cpu":
        return torch.from_numpy(x_TV.numpy().argmax(-1))
    return x_TV.argmax(-1)


def _processors(
    sampling: Sampling,
) -> tuple[Processor | None, list[Processor], Processor | None]:
    """The processors for repetition penalty, for temperature and top-k, and for min-p."""
    # Imported only here: it takes a second.
    from transformers.generation import logits_process

    processors: list[Processor] = []
    if sampling.temperature not in (0, 1):
        processors.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(logits_process.TopKLogitsWarper(sampling.top_k))
    penalty = min_p = None
    if sampling.repetition_penalty != 1:
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(
            float(sampling.repetition_penalty)
        )
    if sampling.min_p:
        min_p = logits_process.MinPLogitsWarper(float(sampling.min_p))
    return penalty, processors, min_p


def gumbel_noise(seed: int, position: int, size: int) -> Tensor:
    """Gumbel noise of one position of a sequence, fp32 [V] on the CPU.

    Args:
        position: position of the token in its sequence.
        size: number of allowed ids V.
    """
    # NumPy draws from the exponential distribution faster than PyTorch (docs/results/generate.md).
    exponential_V = np.random.default_rng((seed, position)).standard_exponential(size)
    return torch.from_numpy(exponential_V).float().log_().neg_()
