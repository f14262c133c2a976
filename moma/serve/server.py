"""The process of a server: its socket and its signals."""

import signal
import socket
import threading
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from moma.errors import UserError, error_reason
from moma.serve.engine import Engine


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the server: after Ctrl-C at once, otherwise when the requests it has are answered."""
        if sig == signal.SIGINT:
            # Not here: what was interrupted may hold the engine's lock.
            threading.Thread(target=self._engine.stop).start()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket on an address of this machine; port 0 means any that is free.

    Raises:
        UserError: the address does not exist or is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error_reason(error)}; choose another"
        ) from error


def run_server(app: ASGIApp, engine: Engine, listener: socket.socket) -> None:
    """Serve until Ctrl-C, which cancels requests, or SIGTERM, which completes them."""
    config = uvicorn.Config(app, log_level="warning", server_header=False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at the end
    try:
        with suppress(KeyboardInterrupt):
            _Server(config, engine).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
