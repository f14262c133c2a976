"""How servers read connections."""

import asyncio
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

# Until the head of a request has arrived.
_HEAD_SECONDS = 60.0
_Protocol: Any = AutoHTTPProtocol


def server_config(app: Any, head_seconds: float = _HEAD_SECONDS, **options: Any) -> Config:
    """The configuration of a server that closes connections whose requests do not begin in time.

    `uvicorn` limits only the time between two requests. The time of a body is limited by
    `read_body`.

    Args:
        head_seconds: time until the head of a request has arrived.
        options: further options of `uvicorn.Config`.
    """

    class Protocol(_Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(error)

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            elif self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self.transport.close)

    # A websocket would keep the timer of its connection.
    options |= {"http": Protocol, "ws": "none"}
    return Config(app, log_level="warning", server_header=False, **options)
