"""Many requests at once, too many, a server that stops, an engine that dies."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import openai
import pytest

from mgvq_serve import app, body
from mgvq_serve.admission import Admission
from mgvq_serve.errors import ApiError
from tests.serve.conftest import RunningServer, ask, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_stream_bytes import events


def test_eight_run_together(serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = serve(engine)
    with ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(server.post, ask(f"number {i}")) for i in range(8)]
        assert wait_until(lambda: server.server._app.service.engine.num_open == 8)
        engine.gate.set()
        texts = [one.result().json()["choices"][0]["message"]["content"] for one in replies]
    assert texts == [f"number {i}" for i in range(8)]
    assert engine.most_running > 1


def test_a_full_queue_says_when_to_come_back(serve) -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.gate.clear()
    server = serve(engine, max_queue=1)
    with ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(server.post, ask("fine")) for _ in range(2)]
        assert wait_until(lambda: server.server._app.service.engine.num_open == 2)
        for n in (1, 3):
            response = server.post(ask("one more", n=n))
            assert response.status_code == 429
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert response.json()["error"]["code"] == "queue_full"
            assert response.json()["error"]["type"] == "rate_limit_error"
        with server.client() as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**ask("one more"))
        engine.gate.set()
        assert [one.result().status_code for one in accepted] == [200, 200]
    assert server.post(ask("fine")).status_code == 200
    response = server.post(ask("alone, and still too many", n=3))  # no waiting helps this one
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


def test_admission_counts_bytes() -> None:
    admission = Admission(max_running=2, max_queue=2, max_open_bytes=100)
    with admission.hold_body() as hold, admission.hold_body() as other:
        hold.add(300)
        hold.add(200)  # alone, any body fits
        with pytest.raises(ApiError) as caught:
            other.add(1)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert admission.open_bytes == 500
    with admission.hold_body() as hold, admission.hold_body() as other:
        hold.add(60)
        other.add(40)
        assert admission.open_bytes == 100
        other.release()
        hold.add(40)
    assert admission.open_bytes == 0
    admission.is_draining = True
    with pytest.raises(ApiError) as caught, admission.admit(1):
        pass
    assert (caught.value.status, caught.value.code) == (503, "draining")


def announce(server: RunningServer, length: str) -> socket.socket:
    """Begin a request, of whose body one byte comes."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\n{length}\r\n\r\n"
    )
    body = "1\r\n{\r\n" if "chunked" in length else "{"
    connection.sendall((head + body).encode())
    return connection


@pytest.mark.parametrize("length", ["Content-Length: 64000000", "Transfer-Encoding: chunked"])
def test_bytes_that_are_only_announced_are_not_held(serve, length: str) -> None:
    server = serve(FakeEngine())
    admission = server.server._app.service.admission
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(announce(server, length))
        assert wait_until(lambda: admission.open_bytes == 6)
        assert server.post(ask("fine")).status_code == 200
    assert wait_until(lambda: admission.open_bytes == 0)


def test_bodies_are_held_until_the_engine_has_their_requests(serve) -> None:
    server = serve(FakeEngine(step_s=0.01), max_body_mb=0.01)
    service = server.server._app.service
    fields = {"user": "x" * 9_000, "stream": True}  # five of them are more than four of the largest
    with ExitStack() as stack:
        for _ in range(6):
            reply = stack.enter_context(
                server.http.stream("POST", "/v1/chat/completions", json=ask("count", **fields))
            )
            assert reply.status_code == 200
        assert (service.engine.num_open, service.admission.open_bytes) == (6, 0)


def test_a_body_is_freed_before_its_answer_is_made(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = threading.Event()

    class Body(bytes):
        def __del__(self) -> None:
            freed.set()

    async def read(*arguments: Any) -> Body:
        return Body(await body.read_json_body(*arguments))

    monkeypatch.setattr(app, "read_json_body", read)
    engine = FakeEngine()
    engine.gate.clear()
    server = serve(engine)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, ask("fine"))
        is_freed = freed.wait(5)  # the answer waits for the gate
        engine.gate.set()
        assert whole.result().status_code == 200
    assert is_freed


def test_bodies_too_large_together_are_read_to_the_end_and_refused(serve) -> None:
    server = serve(FakeEngine(), max_body_mb=1)
    admission = server.server._app.service.admission
    admission.max_open_bytes = 500_000
    with announce(server, "Content-Length: 1000000"):
        assert wait_until(lambda: admission.open_bytes == 1)
        response = server.post(ask("x" * 900_000))
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert admission.open_bytes == 1
        assert server.post(ask("fine")).status_code == 200


def test_a_body_that_drips_is_given_up(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "TOTAL_TIMEOUT_S", 0.3)
    with announce(serve(FakeEngine()), "Content-Length: 1000") as connection:
        reader = threading.Thread(target=lambda: replies.append(connection.recv(4096)))
        replies: list[bytes] = []
        reader.start()
        for _ in range(100):
            if not reader.is_alive():
                break
            connection.sendall(b" ")
            reader.join(0.05)
        reader.join(10)
    assert replies[0].startswith(b"HTTP/1.1 408 ")


def test_a_dead_engine(serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = serve(engine)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, ask("count"))
        stream = pool.submit(server.post, ask("count", stream=True))
        assert wait_until(lambda: server.server._app.service.engine.num_open == 2)
        assert server.http.get("/health").status_code == 200
        engine.fails_next_step = True
        engine.gate.set()
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "engine_dead"
        # the stream may have been waiting for its turn (then 503) or have begun (then an event)
        reply = stream.result()
        last = events(reply.content)[-1] if reply.status_code == 200 else reply.json()
        assert last["error"]["code"] == "engine_dead"
        assert "secret" not in reply.text + whole.result().text
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/health/ready").status_code == 503
    response = server.post(ask("hello?"))
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert server.server._app.service.engine.has_failed


def test_open_answers_finish_when_the_server_stops(serve) -> None:
    engine = FakeEngine(step_s=0.02)
    server = serve(engine, drain_timeout=10)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.post, ask("count", max_tokens=20))
        stream = pool.submit(server.post, ask("count", max_tokens=20, stream=True))
        assert wait_until(lambda: server.server._app.service.engine.num_open == 2)
        server.stop_soon()
        assert whole.result().json()["usage"]["completion_tokens"] == 20
        assert events(stream.result().content)[-1]["choices"][0]["finish_reason"] == "length"
    server.thread.join(5)
    assert not server.thread.is_alive()


def test_answers_that_take_too_long_end_with_an_error(serve) -> None:
    engine = FakeEngine(step_s=0.02)
    server = serve(engine, drain_timeout=0.3)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, ask("count"))
        body = ask("count", stream=True)
        with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            assert wait_until(lambda: server.server._app.service.engine.num_open == 2)
            server.stop_soon()
            assert events(b"".join(stream.iter_raw()))[-1]["error"]["code"] == "draining"
        assert whole.result().status_code == 503
    server.thread.join(5)
    assert not server.thread.is_alive()
    ours = ("mgvq-engine", "mgvq-media", "mgvq-forms")  # the kernels keep threads of their own
    assert wait_until(  # a pool that is shut down ends its threads in its own time
        lambda: not any(thread.name.startswith(ours) for thread in threading.enumerate())
    )
