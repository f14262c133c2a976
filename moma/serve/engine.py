"""One thread that continues the prompts of many clients together (continuous batching).

    submit → queue → decoder: up to `max_active` requests → answer, read by its client

The thread alone uses the model. A request that ends or is cancelled leaves its place to the next
one in the queue, between two passes.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from moma.errors import UserError
from moma.generate.decode import Decoder, NewTokens
from moma.generate.mixed import MixedModel
from moma.generate.sequence import Request
from moma.generate.settings import Settings
from moma.generate.stream import Content, ContentStream
from moma.images import square_pixels
from moma.serve.answer import Answer, AnswerEnd

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class BusyError(Exception):
    """An engine and its queue have as many requests as they take."""


class EngineStoppedError(Exception):
    """The engine takes no more requests: it was closed, or its thread failed."""


@dataclass(eq=False)
class _Prompt:
    """What requests with the same prompt share, so that its images are encoded once."""

    parts: Sequence[Content]
    request: Request | None = None


@dataclass(eq=False)
class _Job:
    """A request, and what is known of its answer."""

    number: int
    answer: Answer
    prompt: _Prompt
    settings: Settings
    stream: ContentStream
    has_rows: bool


class Engine:
    """Continues prompts of many clients; a context manager that owns the thread.

    Args:
        model: the model, which nothing else may use meanwhile.
        max_active: maximum number of requests that are generated together.
        max_queued: maximum number of requests that wait.

    Attributes:
        error: what made the thread fail; None: nothing.
        total_tokens: number of tokens generated so far.

    Raises:
        UserError: a number is too small.
    """

    def __init__(self, model: MixedModel, max_active: int = 8, max_queued: int = 64):
        if max_active < 1 or max_queued < 0:
            raise UserError(
                f"max_active {max_active}, max_queued {max_queued}: must be at least 1 and 0"
            )
        self.model, self.max_active, self.max_queued = model, max_active, max_queued
        self.error: BaseException | None = None
        self.total_tokens = 0
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._active: dict[int, _Job] = {}
        self._cancelled: list[int] = []
        self._calls: list[tuple[Future[Any], Callable[[], None]]] = []
        self._count, self._is_open = 0, True
        self._thread = threading.Thread(target=self._run, name="moma engine", daemon=True)

    def __enter__(self) -> "Engine":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel all requests and end the thread."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Cancel all requests and take no more."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    @property
    def active(self) -> int:
        """Number of requests that are being generated."""
        return len(self._active)

    @property
    def queued(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    @property
    def stopped(self) -> str | None:
        """Why the engine takes no requests; None: it does."""
        if self.error is not None:
            return "the engine has failed; the server's log says why"
        return None if self._is_open else "the server is shutting down; try another one"

    def submit(
        self,
        prompt: Sequence[Any],
        settings: Sequence[Settings],
        has_rows: bool = False,
        read: Callable[[Any], Image.Image] = lambda image: image,
    ) -> list[Answer]:
        """Continue a prompt several times, each once fewer than `max_active` requests are active.

        Args:
            prompt: texts, and images or what `read` decodes, in order.
            settings: how; they differ in the seed only.
            has_rows: whether the answer has the upper rows of unfinished images as well; rows are
                left out while earlier ones have not been read.
            read: decodes an image of the prompt; called once the prompt is known to fit.

        Raises:
            UserError: the prompt is longer than the context allows, images are needed and there is
                no codec, or the new tokens are too few for an image.
            BusyError: the queue has no space for all of them.
            EngineStoppedError: the engine is closed or has failed.
        """
        model, first = self.model, settings[0]
        mode, span = model.mode(first), model.model.vocabulary.image_span
        if mode == "image" and first.new_tokens is not None and first.new_tokens < span:
            raise UserError(f"at most {first.new_tokens} new tokens: an image has {span}")
        tokens = model.require_space(prompt, mode, first.images)
        # Large images would wait in the queue otherwise.
        shared = _Prompt(
            [part if isinstance(part, str) else self._shrink(read(part)) for part in prompt]
        )
        answers = [Answer(tokens, self._cancel) for _ in settings]
        with self._changed:
            if self.stopped:
                raise EngineStoppedError(self.stopped)
            waiting = len(self._queue) + len(self._active) + len(settings)
            if waiting > self.max_active + self.max_queued:
                raise BusyError(
                    f"the server is busy: it generates {self.max_active} requests at a time, and "
                    f"{self.max_queued} may wait; try again later"
                )
            for answer, each in zip(answers, settings, strict=True):
                stream = model.content_stream(each.stop)
                self._count += 1
                self._queue.append(_Job(self._count, answer, shared, each, stream, has_rows))
            self._changed.notify_all()
        return answers

    def call(self, function: Callable[[MixedModel], _T]) -> Future[_T]:
        """Call a function with the model in the engine's thread, between two passes.

        Raises:
            EngineStoppedError: the engine is closed or has failed.
        """
        called: Future[_T] = Future()

        def run() -> None:
            try:
                called.set_result(function(self.model))
            except Exception as error:
                called.set_exception(error)

        with self._changed:
            if self.stopped:
                raise EngineStoppedError(self.stopped)
            self._calls.append((called, run))
            self._changed.notify_all()
        return called

    def _shrink(self, image: Image.Image) -> Image.Image:
        return Image.fromarray(square_pixels(image, self.model.codec.config.image_size))

    def _cancel(self, answer: Answer) -> None:
        with self._changed:
            for job in [*self._queue, *self._active.values()]:
                if job.answer is answer:
                    self._leave(job, "cancelled")
                    self._cancelled.append(job.number)

    def _leave(self, job: _Job, end: AnswerEnd, error: Exception | None = None) -> None:
        """End a request and free its place."""
        with self._changed:
            if self._active.pop(job.number, None) is None and job in self._queue:
                self._queue.remove(job)
            job.answer.finish(end, error)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            decoder = Decoder(self.model.model)
            while self._wait():
                self._update(decoder)
                for new in decoder.step():
                    self._deliver(new, decoder)
        except Exception as error:
            logger.exception("the engine failed")
            self.error = error
        with self._changed:
            stopped = None if self.error is None else EngineStoppedError(self.stopped)
            for called, _ in self._calls:
                called.set_exception(EngineStoppedError(self.stopped))
            for job in [*self._queue, *self._active.values()]:
                self._leave(job, "error" if stopped else "cancelled", stopped)

    def _wait(self) -> bool:
        """Wait for work; return whether the engine goes on."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._queue or self._active or self._calls or not self._is_open
            )
            return self._is_open

    def _update(self, decoder: Decoder) -> None:
        """Let cancelled requests leave the decoder, queued ones enter it, and calls run."""
        with self._changed:
            calls, self._calls = self._calls, []
            cancelled, self._cancelled = self._cancelled, []
            taken: list[_Job] = []
            while self._queue and len(self._active) < self.max_active:
                taken.append(self._queue.popleft())
                self._active[taken[-1].number] = taken[-1]
        for _, run in calls:
            run()
        for number in cancelled:
            decoder.cancel(number)
        for job in taken:
            try:
                prompt = job.prompt
                prompt.request = prompt.request or self.model.request(prompt.parts, job.settings)
                job.answer.ids += prompt.request.branches[0].prompt
                decoder.add(job.number, prompt.request._replace(seed=job.settings.sampling.seed))
            except Exception as error:
                self._fail(job, error)

    def _deliver(self, new: NewTokens, decoder: Decoder) -> None:
        job = self._active.get(new.number)
        if job is None:  # cancelled during the pass
            return
        if isinstance(new.end, UserError):
            self._fail(job, new.end)
            return
        self.total_tokens += len(new.tokens)
        try:
            events = job.stream.add(new.tokens, job.has_rows and not job.answer.has_unread)
            events += job.stream.finish() if new.end else []
        except Exception as error:
            decoder.cancel(job.number)
            self._fail(job, error)
            return
        job.answer.ids += new.tokens
        job.answer.add(len(new.tokens), events)
        if new.end:
            self._leave(job, new.end)

    def _fail(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, UserError):
            logger.error("a request failed", exc_info=error)
        self._leave(job, "error", error)
