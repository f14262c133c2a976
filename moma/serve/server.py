"""The process of a server: its socket and its signals."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from moma.errors import UserError, error_reason, quote
from moma.serve.connection import server_config
from moma.serve.engine import Engine


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, engine: Engine, end: Callable[[], None]):
        super().__init__(config)
        self._engine, self._end = engine, end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the server: after Ctrl-C at once, otherwise when the requests it has are answered."""
        if sig == signal.SIGINT:
            # Not here: what was interrupted may hold the engine's lock.
            threading.Thread(target=self._engine.stop).start()
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: loop.create_task(self._end_when_idle()))
        super().handle_exit(sig, frame)

    async def _end_when_idle(self) -> None:
        while self._engine.active or self._engine.queued:
            await asyncio.sleep(0.1)
        self._end()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on an address of this machine; port 0 means any that is free.

    Raises:
        UserError: the address does not exist or is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, TypeError, UnicodeError) as error:  # a host with a NUL, or not a name
        raise UserError(
            f"--host {quote(host)} --port {port}: {error_reason(error)}; choose another"
        ) from error


def run_server(
    app: ASGIApp, engine: Engine, listener: socket.socket, end: Callable[[], None] = lambda: None
) -> None:
    """Serve until Ctrl-C, which cancels requests, or SIGTERM, which completes them.

    Then `end` is called, which must end the connections that are still open.
    """
    config = server_config(app)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at the end
    try:
        with suppress(KeyboardInterrupt):
            _Server(config, engine, end).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
