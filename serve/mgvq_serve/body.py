"""Reading a request body within limits (called by `app` before anything is parsed)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from mgvq_serve.errors import ApiError

IDLE_TIMEOUT_S = 30.0  # a client that sends nothing for so long has forgotten its request


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a JSON request.

    Raises:
        ApiError: 415 if the content type is not JSON, 413 if the body is larger than `max_bytes`,
            408 if the client stops sending.
        ClientDisconnect: if the client goes away before the end.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(
            415,
            f"expected Content-Type: application/json, got {content_type[:60]!r}",
            code="unsupported_media_type",
        )
    announced = content_length(request)
    if announced > max_bytes and "expect" in request.headers:
        raise _too_large(max_bytes)
    pieces: list[bytes] = []
    size = 0
    async for piece in _pieces(request.stream()):
        size += len(piece)
        if max(size, announced) <= max_bytes:
            pieces.append(piece)
        elif size > 2 * max_bytes:
            break
        else:
            pieces.clear()  # read on a while: a client still writing would miss the answer
    if max(size, announced) > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(pieces)


def content_length(request: Request) -> int:
    """Return the announced size of the body in bytes, 0 where there is none."""
    value = request.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else 0


async def _pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, "the request body did not arrive", code="body_timeout") from None
        yield piece


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the request body is larger than {max_bytes / 1e6:g} MB (--max-body-mb)",
        code="body_too_large",
    )
