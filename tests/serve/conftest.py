"""Servers on free ports, in threads, in front of the fake engine."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from mgvq_serve.app import create_app
from mgvq_serve.server import Server
from mgvq_serve.settings import ServerSettings
from tests.serve.fake_engine import FakeEngine

MODEL = "test-model"


@dataclass
class RunningServer:
    url: str
    engine: Any
    server: Server
    thread: threading.Thread
    http: httpx.Client

    def stop_soon(self) -> None:
        self.server.should_exit = True

    def stop(self) -> None:
        self.stop_soon()
        self.thread.join(20)
        self.http.close()
        assert not self.thread.is_alive(), "the server thread hangs"

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20
        )

    def post(self, body: Any, **headers: str) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def post_raw(self, content: Any, **headers: str) -> httpx.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post("/v1/chat/completions", content=content, headers=names)


def start_server(
    engine: Any, settings: ServerSettings | None = None, pictures: tuple[Path, ...] = ()
) -> RunningServer:
    settings = settings or ServerSettings(drain_timeout=1)
    max_num_seqs = getattr(engine, "max_num_seqs", 8)
    app = create_app(
        engine, settings, model_name=MODEL, max_num_seqs=max_num_seqs, pictures=pictures
    )
    urls: list[str] = []
    ready = threading.Event()

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    server = Server(app, "127.0.0.1", 0, settings.drain_timeout, on_ready)
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    assert ready.wait(20), "the server did not start"
    http = httpx.Client(base_url=urls[0], timeout=20)
    return RunningServer(urls[0], engine, server, thread, http)


@pytest.fixture
def serve() -> Iterator[Callable[..., RunningServer]]:
    """Start servers with any engine and settings; they stop after the test."""
    running: list[RunningServer] = []

    def start(
        engine: Any = None, pictures: tuple[Path, ...] = (), **settings: Any
    ) -> RunningServer:
        chosen = ServerSettings(**({"drain_timeout": 1} | settings))
        running.append(start_server(engine or FakeEngine(), chosen, pictures))
        return running[-1]

    yield start
    for server in running:
        if hasattr(server.engine, "gate"):
            server.engine.gate.set()
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """One server with the fake engine, for tests that leave it as they found it."""
    running = start_server(FakeEngine())
    yield running
    running.stop()


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def ask(text: str = "hello world", **fields: Any) -> dict[str, Any]:
    """A request body with one user message."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]} | fields


def data_url(size: tuple[int, int] = (40, 30), image_format: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, image_format)
    payload = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{image_format.lower()};base64,{payload}"


def image_part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | more}


def wait_until(claim: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if claim():
            return True
        time.sleep(0.01)
    return claim()
