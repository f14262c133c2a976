"""Reading of answers for one client: several at once, ended when the client disconnects."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import Request

from moma.generate.stream import Event
from moma.serve.answer import Answer


async def until_disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def reading(
    request: Request, answers: Sequence[Answer], observe: Callable[[Answer], None]
) -> AsyncIterator[None]:
    """Cancel answers when the client disconnects, or reading them ends early; then observe each."""

    async def watch() -> None:
        await until_disconnected(request)
        for answer in answers:
            answer.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        for answer in answers:
            answer.cancel()
            observe(answer)


async def merge(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Event | None]]:
    """Yield the events of several answers as they come, with their numbers; None: it has ended."""
    iterators = [aiter(answer) for answer in answers]
    waiting = {
        asyncio.ensure_future(anext(iterator)): number for number, iterator in enumerate(iterators)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    event = task.result()
                except StopAsyncIteration:
                    yield number, None
                    continue
                waiting[asyncio.ensure_future(anext(iterators[number]))] = number
                yield number, event
    finally:
        for task in waiting:
            task.cancel()
