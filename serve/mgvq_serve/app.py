"""The web application: routes, and what each failure looks like (built by `cli`, run by `server`).

Routes read the request and choose the shape of the response; what a request means is in `chat`.
`ServeApp` is the ASGI app: FastAPI inside, request ids around it, the engine thread behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from mgvq_runtime import __version__
from mgvq_serve.body import read_json_body
from mgvq_serve.chat import ChatService, ServedModel, model_not_found
from mgvq_serve.disconnect import ClientDisconnectedError, watch_disconnect
from mgvq_serve.errors import ApiError, engine_dead, unavailable
from mgvq_serve.middleware import ApiKeyMiddleware, LastResortMiddleware, RequestIdMiddleware
from mgvq_serve.protocol import ChatRequest
from mgvq_serve.service import ServableEngine, build_service
from mgvq_serve.settings import ServerSettings
from mgvq_serve.stream import EventStream

WEB_DIR = Path(__file__).parent / "web"
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the access log shows it
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class ServeApp:
    """The ASGI app with the parts that the server around it must reach."""

    def __init__(self, service: ChatService, inner: ASGIApp) -> None:
        """Put request ids around `inner`."""
        self.service = service
        self._asgi = RequestIdMiddleware(inner)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        await self._asgi(scope, receive, send)

    def drain(self) -> None:
        """Take no more requests; those that are open go on."""
        self.service.admission.is_draining = True

    def end_open_requests(self) -> None:
        """End what is still open with an error that says why."""
        self.service.engine.fail_open(unavailable("The server is shutting down.", "draining"))


def create_app(
    engine: ServableEngine,
    settings: ServerSettings,
    *,
    model_name: str,
    max_num_seqs: int,
    pictures: Sequence[Path] = (),
) -> ServeApp:
    """Build the application around an engine; the engine thread starts with the server.

    Args:
        engine: A loaded engine. From the server's start on, only its thread touches it.
        settings: Limits and manners.
        model_name: Name of the model on the wire.
        max_num_seqs: Requests the engine runs at the same time.
        pictures: Example pictures that the chat page offers.
    """
    max_body_bytes = int(settings.max_body_mb * 1e6)
    service = build_service(engine, settings, model_name, max_num_seqs)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)
            service.close()

    app = FastAPI(
        title="MGVQ Runtime",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
    )
    _add_chat(app, service, max_body_bytes, settings.sse_ping_interval)
    _add_models(app, service.model)
    _add_health(app, service)
    _add_page(app, pictures)
    _add_error_handlers(app)
    if settings.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key)
    app.add_middleware(LastResortMiddleware)  # the outermost
    return ServeApp(service, app)


def _add_chat(
    app: FastAPI, service: ChatService, max_body_bytes: int, ping_interval_s: float
) -> None:
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body})
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation with pictures, whole or as a stream of server-sent events."""
        if service.engine.is_dead:
            raise engine_dead()
        service.admission.check()
        async with AsyncExitStack() as stack:
            with service.admission.hold_body() as hold:
                data = await read_json_body(request, max_body_bytes, hold)
                watcher = await stack.enter_async_context(watch_disconnect(request.receive))
                call = await watcher.race(service.open(data, stack))
                del data  # and with it what is held: the answer needs it no more
            if call.request.stream:
                return EventStream(call.chunks(ping_interval_s), watcher, stack.pop_all())
            return JSONResponse(await watcher.race(call.completion()))

    def openapi() -> dict[str, Any]:
        document = FastAPI.openapi(app)
        document.setdefault("components", {}).setdefault("schemas", {}).update(parts)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_models(app: FastAPI, model: ServedModel) -> None:
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "mgvq",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        """Describe the model."""
        if model_id != model.name:
            raise model_not_found(model_id, model.name)
        return card


def _add_health(app: FastAPI, service: ChatService) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Say whether the engine lives: 200, or 503 for good."""
        if service.engine.is_dead:
            return JSONResponse({"status": "engine_dead"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """Say whether requests are taken now."""
        if service.engine.is_dead or service.admission.is_draining:
            status = "engine_dead" if service.engine.is_dead else "draining"
            return JSONResponse({"status": status}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ok"})


def _add_page(app: FastAPI, pictures: Sequence[Path]) -> None:
    by_name = {picture.name: picture for picture in pictures}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB_DIR / "index.html", headers=PAGE_HEADERS)

    @app.get("/assets/pictures", include_in_schema=False)
    async def list_pictures() -> dict[str, Any]:
        return {"pictures": [{"name": n, "url": f"/assets/pictures/{n}"} for n in by_name]}

    @app.get("/assets/pictures/{name}", include_in_schema=False)
    async def get_picture(name: str) -> Response:
        if name not in by_name:
            raise HTTPException(404)
        return FileResponse(by_name[name], headers={"cache-control": "max-age=3600"})


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        error_type = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        message = f"{error.detail}: {request.method} {request.url.path[:200]}"
        body = ApiError(error.status_code, message, error_type=error_type).body()
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(ClientDisconnectedError)
    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
