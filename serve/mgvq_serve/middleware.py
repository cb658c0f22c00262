"""Around every request: its id, its last resort, the API key (wrapped around the app by `app`).

Plain ASGI: a middleware that wraps responses would hide the client's disconnect from streams.
"""

from __future__ import annotations

import hmac
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgvq_serve.errors import ApiError, internal_error

log = logging.getLogger("mgvq_serve")

SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIdMiddleware:
    """Puts x-request-id on every response: the client's own if it is harmless, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an app."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not SAFE_REQUEST_ID.fullmatch(request_id):
            request_id = str(uuid.uuid4())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class LastResortMiddleware:
    """Answers 500 where the app raised: the traceback goes to the log, nothing to the client.

    Starlette's own would raise once more after its answer, and the server would cut the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an app."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app (ASGI)."""
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if scope["type"] != "http" or has_started:
                raise
            log.exception("a request failed")
            error = internal_error()
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, send)


class ApiKeyMiddleware:
    """Lets requests to /v1 pass only with the key; health, the page and its pictures stay open."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        """Wrap an app."""
        self._app = app
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, or answer 401 (ASGI)."""
        if scope["type"] == "http" and _is_guarded(scope["path"]):
            headers = Headers(scope=scope)
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                given = headers.get("x-api-key", "")
            # compare_digest takes the same time however much of the key is right
            if not hmac.compare_digest(given.strip().encode("latin-1"), self._api_key):
                error = ApiError(
                    401,
                    "a valid API key is needed: Authorization: Bearer KEY",
                    error_type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                response = JSONResponse(error.body(), error.status, error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_guarded(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")
