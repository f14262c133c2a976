"""Sequences that are being generated, and what is asked for.

Shapes: R allowed ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from moma.errors import UserError
from moma.generate.grammar import Grammar, Mode
from moma.generate.sampling import Sampling, gumbel_noise
from moma.vocabulary import Vocabulary


class Branch(NamedTuple):
    """A prompt whose logits are added to those of a request's other branches."""

    prompt: Sequence[int]
    weight: float = 1.0


class Request(NamedTuple):
    """A sequence to generate.

    Attributes:
        branches: the prompt, and further ones for guidance; the new tokens are appended to each.
            Every prompt starts with the vocabulary's `beginning`.
        seed: seed of the sequence's noise.
    """

    branches: Sequence[Branch]
    seed: int = 0


@dataclass(frozen=True)
class Options:
    """How sequences are generated.

    Attributes:
        mode: see `Grammar`.
        context: maximum number of tokens of a prompt and its continuation.
        new_tokens: maximum number of tokens of a continuation, at least 1.
        sampling: how text is sampled; its seed is not used.
        image_sampling: how image codes are sampled; if omitted, like text.
        images: number of images that the mode `image` generates.
        drafts: number of image codes that a pass checks besides sampling one.
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
    drafts: int = 0
    stop: Callable[[Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 1), ("images", 1), ("drafts", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {least}")


class GeneratedSequence:
    """A sequence being generated.

    Attributes:
        number: of its request.
        weights: of its branches.
        feeds: for each branch, the tokens of the next pass; drafts come last.
        drafted: number of drafts in the last pass.
        kept: for each branch, the number of tokens of the last pass that stay in the caches.
        is_complete: whether it has ended.
    """

    def __init__(self, number: int, request: Request, vocabulary: Vocabulary, options: Options):
        self.number, self._seed, self._options = number, request.seed, options
        self.weights = [branch.weight for branch in request.branches]
        self.tokens = list(request.branches[0].prompt)
        self._first = self._yielded = len(self.tokens)
        self._limit = min(options.context, len(self.tokens) + options.new_tokens)
        self.grammar = Grammar(vocabulary, options.mode, options.images)
        for token in self.tokens:
            self.grammar.advance(token)
        self._noise: dict[tuple[int, int], Tensor] = {}
        self._drafts: list[int] = []
        self.drafted, self.is_complete = 0, False
        self._append_forced()
        self._fed = len(self.tokens)
        forced = self.tokens[self._first :]
        self.feeds = [[*branch.prompt, *forced] for branch in request.branches]
        self.kept = [0] * len(self.feeds)

    @property
    def has_new(self) -> bool:
        """Whether there are tokens that `take_new` has not returned yet."""
        return len(self.tokens) > self._yielded

    def take_new(self) -> list[int]:
        """Return the new tokens since the last call."""
        new, self._yielded = self.tokens[self._yielded :], len(self.tokens)
        return new

    @property
    def wants_codes(self) -> bool:
        """Whether the next token is an image code."""
        return self.grammar.allowed().codes

    @property
    def may_begin_image(self) -> bool:
        """Whether the next token may begin an image."""
        return self.grammar.allowed(self._limit - len(self.tokens)).begin_image

    @property
    def max_drafts(self) -> int:
        """Maximum number of drafts after the next token."""
        if not self.wants_codes:
            return 0
        left = min(self.grammar.codes_left, self._limit - len(self.tokens))
        return min(self._options.drafts, left - 1)

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
        self.kept = [len(feed) - len(drafts) + count for feed in self.feeds]
        self._fed = len(self.tokens) + count
        for token in samples[: count + 1]:
            self._append(token)
        self._append_forced()
        guesses = [*samples[count + 1 :], *next_drafts]
        self._drafts = guesses[: max(0, self.max_drafts)] if not self.is_complete else []
        self._noise = {key: n for key, n in self._noise.items() if key[0] >= len(self.tokens)}
        self.feeds = [[*self.tokens[self._fed :], *self._drafts] for _ in self.feeds]

    def _append(self, token: int) -> None:
        if self.is_complete:
            return
        self.tokens.append(token)
        self.grammar.advance(token)
        stop = self._options.stop
        self.is_complete = (
            self.grammar.ends_with(token)
            or len(self.tokens) >= self._limit
            or (stop is not None and stop(self.tokens[self._first :]))
        )

    def _append_forced(self) -> None:
        """Append tokens for which there is no choice."""
        while not self.is_complete and (forced := self.grammar.allowed().forced) is not None:
            self._append(forced)
