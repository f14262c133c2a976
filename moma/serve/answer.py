"""An answer while it is generated: written by the engine's thread, read by its client."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Literal

from moma.generate.stream import Event, ImagePart, TextPiece

# `stop` and `length`: see `moma.generate.sequence.End`.
AnswerEnd = Literal["stop", "length", "cancelled", "error"]


class Answer:
    """What follows a prompt, as an iterator over text and images as they come.

    It is read once, by a `for` or an `async for` loop; the loop raises `error` where the answer
    ends with one. What is not read yet is joined: pieces of text to one, and of an unfinished image
    only the newest rows are kept, so that a slow reader needs no more memory than the answer.

    Attributes:
        new_tokens: number of tokens generated so far.
        ids: of the prompt and of what follows it so far; the prompt's are known once it has a
            place.
        end: why it has ended; None: it goes on.
        error: what made it fail, if `end` is `error`.
        submitted, first, ended: times by `time.monotonic`; None: not yet.
    """

    def __init__(self, prompt_tokens: int, cancel: Callable[["Answer"], None]):
        self.prompt_tokens, self.new_tokens = prompt_tokens, 0
        self.ids: list[int] = []
        self.end: AnswerEnd | None = None
        self.error: Exception | None = None
        self.submitted = time.monotonic()
        self.first: float | None = None
        self.ended: float | None = None
        self._cancel = cancel
        self._changed = threading.Condition()
        self._wake: Callable[[], object] = lambda: None
        self._unread: list[Event] = []

    def cancel(self) -> None:
        """End the answer and free its place at once; without effect if it has ended."""
        self._cancel(self)

    @property
    def has_unread(self) -> bool:
        """Whether something has not been read yet."""
        return bool(self._unread)

    def __iter__(self) -> Iterator[Event]:
        """Yield what comes, waiting for it."""
        is_last = False
        while not is_last:
            with self._changed:
                self._changed.wait_for(lambda: self._unread or self.end)
                events, is_last = self._take()
            yield from events
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield what comes, waiting for it."""
        loop, changed, is_last = asyncio.get_running_loop(), asyncio.Event(), False
        with self._changed:
            self._wake = lambda: loop.call_soon_threadsafe(changed.set)
        while not is_last:
            changed.clear()
            with self._changed:
                events, is_last = self._take()
            for event in events:
                yield event
            if not (events or is_last):
                await changed.wait()
        if self.error is not None:
            raise self.error

    def add(self, tokens: int, events: list[Event]) -> None:
        """Take what follows next; called by the engine's thread."""
        with self._changed:
            if self.end is not None:
                return
            self.first = self.first or time.monotonic()
            self.new_tokens += tokens
            for event in events:
                last = self._unread[-1] if self._unread else None
                if isinstance(event, TextPiece) and isinstance(last, TextPiece):
                    event = TextPiece(last.text + event.text)
                    del self._unread[-1]
                elif isinstance(last, ImagePart) and not last.is_complete:
                    del self._unread[-1]
                self._unread.append(event)
            if events:
                self._notify()

    def finish(self, end: AnswerEnd, error: Exception | None = None) -> None:
        """End the answer, unless it has ended; called by the engine."""
        with self._changed:
            if self.end is None:
                self.end, self.error, self.ended = end, error, time.monotonic()
                self._notify()

    def _take(self) -> tuple[list[Event], bool]:
        """What has not been read yet, and whether nothing follows."""
        events, self._unread = self._unread, []
        return events, self.end is not None

    def _notify(self) -> None:
        self._changed.notify_all()
        with suppress(RuntimeError):  # the event loop of a reader that has left is closed
            self._wake()
