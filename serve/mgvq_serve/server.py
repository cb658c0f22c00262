"""Running the app on a port until told to stop (called by `cli`, and by the tests).

On SIGTERM, Ctrl-C or `stop_soon`: no new connections, open answers get the drain time to finish,
the rest end with an error the client can read, then the engine thread stops. A second Ctrl-C does
not wait.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable

import uvicorn

from mgvq_serve.app import ServeApp

KEEP_ALIVE_S = 30
CLOSE_MARGIN_S = 5  # between ending requests with an error and cutting connections


class Server(uvicorn.Server):
    """uvicorn with a drain before the end."""

    def __init__(
        self,
        app: ServeApp,
        host: str,
        port: int,
        drain_timeout_s: float,
        on_ready: Callable[[str], None] = lambda url: None,
    ) -> None:
        """Configure the server.

        Args:
            app: The application.
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            drain_timeout_s: Seconds that open answers get to finish.
            on_ready: Called with the server's URL once it listens.
        """
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="on",
            ws="none",
            log_level="info",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_timeout_s) + CLOSE_MARGIN_S,
        )
        super().__init__(config)
        self._app = app
        self._drain_timeout_s = drain_timeout_s
        self._on_ready = on_ready

    @property
    def url(self) -> str:
        """Where the server listens, with the port it really got."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop_soon(self) -> None:
        """Begin to stop, as on SIGTERM; in the server's own thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and say where."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open answers finish, end the rest with an error, and stop."""
        self._app.drain()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain_timeout_s, self._app.end_open_requests)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
