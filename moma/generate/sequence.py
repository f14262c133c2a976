"""Sequences that are being generated, and what is asked for.

Shapes: R allowed ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from moma.errors import UserError
from moma.generate.grammar import Grammar, Mode
from moma.generate.sampling import Sampler, Sampling, gumbel_noise, sampler_of
from moma.vocabulary import Vocabulary

# Where they are faster than none; see `Decoder`.
DRAFTS = 8


class Branch(NamedTuple):
    """A prompt whose logits are added to those of a request's other branches."""

    prompt: Sequence[int]
    weight: float = 1.0


@dataclass(frozen=True)
class Options:
    """How a sequence is generated.

    Attributes:
        mode: see `Grammar`.
        context: maximum number of tokens of a prompt and its continuation.
        new_tokens: maximum number of tokens of a continuation, at least 1.
        sampling: how text is sampled; its seed is not used.
        image_sampling: how image codes are sampled; if omitted, like text.
        images: number of images that the mode `image` generates.
        drafts: number of image codes that a pass checks besides sampling one; None: `DRAFTS` or 0,
            as `Decoder` expects to be faster.
        stop: whether a continuation ends, given its tokens so far.

    Raises:
        UserError: a number is too small.
    """

    mode: Mode
    context: int
    new_tokens: int
    sampling: Sampling
    image_sampling: Sampling | None = None
    images: int = 1
    drafts: int | None = None
    stop: Callable[[Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 1), ("images", 1), ("drafts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: must be at least {least}")


class Request(NamedTuple):
    """A sequence to generate.

    Attributes:
        branches: the prompt, and further ones for guidance; the new tokens are appended to each.
            Every prompt starts with the vocabulary's `beginning`.
        seed: seed of the sequence's noise.
    """

    branches: Sequence[Branch]
    options: Options
    seed: int = 0


# Why a sequence is complete: the model, a stop condition or the last image ended it; it is as long
# as allowed.
End = Literal["stop", "length"]


class GeneratedSequence:
    """A sequence being generated.

    Attributes:
        default_drafts: the next pass's `Options.drafts` if that is None.
        inputs: for each branch, the tokens of the next pass; drafts come last.
        drafted: number of drafts in the last pass.
        kept: for each branch, the number of tokens of the last pass that stay in the caches.
        end: why it is complete, or what made it fail; None: it goes on.
    """

    def __init__(self, number: int, request: Request, vocabulary: Vocabulary):
        options = request.options
        self.number, self._seed = number, request.seed
        image_sampling = options.image_sampling or options.sampling
        self._samplers = sampler_of(options.sampling), sampler_of(image_sampling)
        if image_sampling.repetition_penalty != 1:
            options = replace(options, drafts=0)
        self._options = options
        self.weights = [branch.weight for branch in request.branches]
        self.tokens = list(request.branches[0].prompt)
        self._first = self._yielded = len(self.tokens)
        self._limit = min(options.context, len(self.tokens) + options.new_tokens)
        self.grammar = Grammar(vocabulary, options.mode, options.images)
        for token in self.tokens:
            self.grammar.advance(token)
        self._noise: dict[tuple[int, int], Tensor] = {}
        self._drafts: list[int] = []
        self.default_drafts = self.drafted = 0
        self.end: End | UserError | None = None
        self._append_forced()
        self._consumed = len(self.tokens)
        forced = self.tokens[self._first :]
        self.inputs = [[*branch.prompt, *forced] for branch in request.branches]
        self.kept = [0] * len(self.inputs)

    def take_new(self) -> list[int]:
        """Return the new tokens since the last call."""
        new, self._yielded = self.tokens[self._yielded :], len(self.tokens)
        return new

    @property
    def wants_codes(self) -> bool:
        """Whether the next token is an image code."""
        return self.grammar.allowed().codes

    @property
    def sampler(self) -> Sampler:
        """Samples the next token."""
        return self._samplers[self.wants_codes]

    @property
    def may_begin_image(self) -> bool:
        """Whether the next token may begin an image."""
        return self.grammar.allowed(self._limit - len(self.tokens)).begin_image

    @property
    def max_drafts(self) -> int:
        """Maximum number of drafts after the next token."""
        drafts = self._options.drafts
        if drafts is None:
            drafts = self.default_drafts
        if not drafts or not self.wants_codes:
            return 0
        left = min(self.grammar.codes_left, self._limit - len(self.tokens))
        return min(drafts, left - 1)

    @property
    def draft_count(self) -> int:
        """Number of drafts in the next pass."""
        return len(self._drafts)

    def noise(self, offset: int, size: int) -> Tensor:
        """Noise of the token `offset` after the next one."""
        key = len(self.tokens) + offset, size
        if key not in self._noise:
            self._noise[key] = gumbel_noise(self._seed, *key)
        return self._noise[key]

    def append(self, samples: Sequence[int], next_drafts: Sequence[int]) -> None:
        """Append the samples that follow from correct drafts.

        Args:
            samples: the next token, and the one after each draft.
            next_drafts: guesses for the tokens after `samples`.
        """
        drafts, count = self._drafts, 0
        while count < len(drafts) and drafts[count] == samples[count]:
            count += 1
        self.drafted = len(drafts)
        self.kept = [len(input_ids) - len(drafts) + count for input_ids in self.inputs]
        self._consumed = len(self.tokens) + count
        for token in samples[: count + 1]:
            self._append(token)
        self._append_forced()
        guesses = [*samples[count + 1 :], *next_drafts]
        self._drafts = guesses[: max(0, self.max_drafts)] if self.end is None else []
        self._noise = {key: n for key, n in self._noise.items() if key[0] >= len(self.tokens)}
        self.inputs = [[*self.tokens[self._consumed :], *self._drafts] for _ in self.inputs]

    def _append(self, token: int) -> None:
        if self.end is not None:
            return
        self.tokens.append(token)
        self.grammar.advance(token)
        stop = self._options.stop
        if self.grammar.ends_with(token) or (stop and stop(self.tokens[self._first :])):
            self.end = "stop"
        elif len(self.tokens) >= self._limit:
            self.end = "length"

    def _append_forced(self) -> None:
        """Append tokens for which there is no choice."""
        while self.end is None and (forced := self.grammar.allowed().forced) is not None:
            self._append(forced)
