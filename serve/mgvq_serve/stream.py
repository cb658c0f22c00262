"""Server-sent events: the bytes of a streamed answer (made by `app` from a `ChatCall`).

One `data:` line a chunk, a comment when nothing else was sent for a while, `[DONE]` exactly once at
the end, also after an error. Does not know what is in a chunk.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mgvq_serve.disconnect import ClientDisconnectedError, DisconnectWatcher
from mgvq_serve.errors import ApiError, internal_error

log = logging.getLogger("mgvq_serve")

SEND_TIMEOUT_S = 60.0  # a client that reads nothing for so long loses its place in the queue
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """Return one event: compact JSON on a single data line."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """A response that sends chunks as they come and ends what it owns when it is over."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any] | None],
        watcher: DisconnectWatcher,
        stack: AsyncExitStack,
    ) -> None:
        """Take over a call.

        Args:
            chunks: Bodies to send; None is a ping.
            watcher: Notices that the client has gone.
            stack: Closed when the stream ends, however it ends: this aborts the call.
        """
        super().__init__(None)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies of the nginx kind pass events on at once
        self._chunks = chunks
        self._watcher = watcher
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""
        async with self._stack:
            try:
                await self._watcher.race(self._send_all(send))
            except ClientDisconnectedError:
                log.debug("the client left a stream")
            except TimeoutError:
                log.info("a client stopped reading its stream; the connection is closed")

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._events()) as events:
            async for data in events:
                message = {"type": "http.response.body", "body": data, "more_body": True}
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes]:
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    yield PING if chunk is None else event(chunk)
        except ApiError as error:
            yield event(error.body())
        except Exception:
            log.exception("a stream failed")
            yield event(internal_error().body())
        yield DONE
