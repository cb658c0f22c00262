"""Reading a request body within limits (called by `app` before anything is parsed)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from mgvq_serve.admission import BodyHold
from mgvq_serve.errors import ApiError

IDLE_TIMEOUT_S = 30.0  # a client that sends nothing for so long has forgotten its request
TOTAL_TIMEOUT_S = 300.0  # or sends a byte now and then: 64 MB in this time are 1.7 Mbit/s


async def read_json_body(request: Request, max_bytes: int, hold: BodyHold) -> bytes:
    """Return the body of a JSON request.

    Args:
        request: The request, of which nothing has been read.
        max_bytes: Size of the largest body.
        hold: Counts what has arrived.

    Raises:
        ApiError: 415 if the content type is not JSON, 413 if the body is larger than `max_bytes`,
            429 if all open bodies are too large together, 408 if the client stops sending.
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
    refusal = _too_large(max_bytes) if announced > max_bytes else None
    pieces: list[bytes] = []
    size = 0
    async for piece in _pieces(request.stream()):
        size += len(piece)
        if refusal is None:
            pieces.append(piece)
            refusal = _refusal(size, len(piece), max_bytes, hold)
        if refusal is not None:  # read on a while: a client still writing would miss the answer
            pieces.clear()
            hold.release()
        if size > 2 * max_bytes:
            break
    if refusal is not None:
        raise refusal
    return b"".join(pieces)


def content_length(request: Request) -> int:
    """Return the announced size of the body in bytes, 0 where there is none."""
    value = request.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else 0


def _refusal(size: int, num_new: int, max_bytes: int, hold: BodyHold) -> ApiError | None:
    """Return why a body of which `size` bytes have come is refused now, if it is."""
    if size > max_bytes:
        return _too_large(max_bytes)
    try:
        hold.add(num_new)
    except ApiError as error:
        return error
    return None


async def _pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    deadline = asyncio.get_running_loop().time() + TOTAL_TIMEOUT_S
    while True:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(now + IDLE_TIMEOUT_S, deadline)):
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
