"""Many requests at once, too many, a server that stops, an engine that dies."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from mgvq_serve.admission import Admission
from mgvq_serve.errors import ApiError
from tests.serve.conftest import ask, wait_until
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
    with admission.hold_body(500):  # alone, any body fits
        with pytest.raises(ApiError) as caught, admission.hold_body(1):
            pass
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
    with admission.hold_body(60), admission.hold_body(40):
        assert admission.open_bytes == 100
    assert admission.open_bytes == 0
    admission.is_draining = True
    with pytest.raises(ApiError) as caught, admission.admit(1):
        pass
    assert (caught.value.status, caught.value.code) == (503, "draining")


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
    ours = ("mgvq-engine", "mgvq-media")  # the kernels keep threads of their own
    assert wait_until(  # a pool that is shut down ends its threads in its own time
        lambda: not any(thread.name.startswith(ours) for thread in threading.enumerate())
    )
