"""A client that leaves takes its request with it, wherever the request is."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from tests.serve.conftest import RunningServer, ask, data_url, image_part, wait_until
from tests.serve.fake_engine import FakeEngine


def send(server: RunningServer, body: dict[str, Any]) -> socket.socket:
    """Send a request over a plain socket and read nothing."""
    raw = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_while_tokens_come(serve, stream: bool, n: int) -> None:
    engine = FakeEngine(step_s=0.01)
    server = serve(engine)
    with send(server, ask("count", stream=stream, n=n)):
        assert wait_until(engine.has_unfinished)
    assert wait_until(lambda: len(engine.aborted) == n)
    assert not engine.has_unfinished()
    assert server.server._app.service.admission.num_open == 0
    assert server.server._app.service.engine.num_open == 0
    assert server.post(ask("fine")).status_code == 200


def test_a_hundred_streams_that_break_at_any_moment(serve) -> None:
    engine = FakeEngine(max_num_seqs=100, step_s=0.001)
    engine.max_model_len = 10**6
    server = serve(engine, max_queue=100)
    for i in range(100):
        with send(server, ask("count", stream=True)):
            time.sleep(i % 10 / 1000)
    assert wait_until(lambda: not engine.has_unfinished())
    assert wait_until(lambda: server.server._app.service.admission.num_open == 0)
    assert len(engine.aborted) == len(engine.requests)


@pytest.mark.parametrize("stream", [False, True])
def test_while_the_engine_is_in_a_long_step(serve, stream: bool) -> None:
    engine = FakeEngine()
    server = serve(engine)
    engine.gate.clear()
    first = send(server, ask("count"))
    assert wait_until(engine.has_unfinished)
    second = send(server, ask("count", stream=stream))  # waits to be added
    service = server.server._app.service
    assert wait_until(lambda: service.engine.num_open == 2)
    second.close()
    assert wait_until(lambda: service.admission.num_open == 1)
    first.close()
    assert wait_until(lambda: service.admission.num_open == 0)
    engine.gate.set()
    assert wait_until(lambda: len(engine.aborted) == 2)
    assert not engine.has_unfinished()


def test_while_the_picture_is_prepared(serve) -> None:
    engine = FakeEngine()
    reached, go_on = threading.Event(), threading.Event()
    prepare = engine.chat_processor.prepare

    def slow(messages: Any, images: Any) -> Any:
        reached.set()
        go_on.wait(10)
        return prepare(messages, images)

    engine.chat_processor.prepare = slow
    server = serve(engine)
    content = [image_part(data_url()), {"type": "text", "text": "count"}]
    with send(server, ask() | {"messages": [{"role": "user", "content": content}]}):
        assert reached.wait(10)
    service = server.server._app.service
    assert wait_until(lambda: service.admission.num_open == 0)
    go_on.set()
    assert server.post(ask("fine")).status_code == 200
    assert [request.prompt.images for request in engine.requests] == [()]  # only the second


def test_half_a_body(serve) -> None:
    engine = FakeEngine()
    server = serve(engine)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model":'
        )
        time.sleep(0.05)
    assert server.post(ask("fine")).status_code == 200
    assert len(engine.requests) == 1


def test_a_client_that_stays_and_reads_nothing(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgvq_serve.stream.SEND_TIMEOUT_S", 0.2)
    engine = FakeEngine()
    engine.max_model_len = 10**6
    server = serve(engine)
    with send(server, ask("flood", stream=True, n=8)) as connection:
        assert wait_until(lambda: len(engine.aborted) == 8, 20)
        assert server.post(ask("fine")).status_code == 200
        while connection.recv(1 << 20):  # what was sent is there, and then the connection ends
            pass


def test_a_client_library_that_stops_reading(serve) -> None:
    engine = FakeEngine(step_s=0.01)
    server = serve(engine)
    with server.client() as client:
        stream = client.chat.completions.create(**ask("count"), stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        assert wait_until(lambda: len(engine.aborted) == 1)
