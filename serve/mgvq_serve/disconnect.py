"""Noticing that the client has gone, whatever the request is waiting for (used by `app`, `stream`).

ASGI servers say so through `receive()` only, and nobody listens there once the body is read:
without this, an answer nobody will read is generated to its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """The client closed the connection; there is nobody to answer."""


class DisconnectWatcher:
    """Listens for the end of one connection."""

    def __init__(self, gone: asyncio.Task[None]) -> None:
        """Wrap the listening task; `watch_disconnect` makes it."""
        self._gone = gone

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, unless the client goes first; then `work` is cancelled.

        Raises:
            ClientDisconnectedError: if the client went first.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientDisconnectedError
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


@asynccontextmanager
async def watch_disconnect(receive: Receive) -> AsyncIterator[DisconnectWatcher]:
    """Listen on `receive`, whose body has been read, for as long as the block runs."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(until_gone())
    try:
        yield DisconnectWatcher(gone)
    finally:
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone
