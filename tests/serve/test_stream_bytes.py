"""The bytes of a stream, as a client without a library sees them."""

from __future__ import annotations

import json
from typing import Any

from tests.serve.conftest import MODEL, RunningServer, ask, wait_until
from tests.serve.fake_engine import FakeEngine


def events(raw: bytes) -> list[Any]:
    """Split a stream; every event is one data line and an empty line."""
    assert raw.endswith(b"\n\n")
    blocks = raw.decode().removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    payloads = [block.removeprefix("data: ") for block in blocks]
    assert payloads[-1] == "[DONE]"
    assert "[DONE]" not in payloads[:-1]
    return [json.loads(payload) for payload in payloads[:-1]]


def test_every_byte_of_a_short_stream(server: RunningServer) -> None:
    response = server.post(ask("one twö", stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"]
    assert "content-length" not in response.headers
    chunks = events(response.content)
    head = {key: value for key, value in chunks[0].items() if key != "choices"}
    assert list(head) == ["id", "object", "created", "model", "system_fingerprint"]
    assert (head["object"], head["model"]) == ("chat.completion.chunk", MODEL)
    assert all({k: v for k, v in c.items() if k != "choices"} == head for c in chunks)

    def one(delta: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]

    found = [chunk["choices"] for chunk in chunks]
    assert found[0] == one({"role": "assistant", "content": ""})
    assert found[-1] == one({}, "stop")
    text = "".join(choices[0]["delta"]["content"] for choices in found[1:-1])
    assert text == "one twö"
    assert "twö".encode() in response.content  # UTF-8, not escapes


def test_usage_key_is_null_until_the_last_chunk(server: RunningServer) -> None:
    body = ask("a", stream=True, stream_options={"include_usage": True})
    chunks = events(server.post(body).content)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == 2


def test_an_error_in_the_stream_is_followed_by_done(server: RunningServer) -> None:
    chunks = events(server.post(ask("nan", stream=True)).content)
    assert "choices" in chunks[0]
    assert chunks[-1]["error"]["type"] == "server_error"
    assert server.post(ask("fine")).status_code == 200


def test_pings_while_nothing_comes(serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = serve(engine, sse_ping_interval=0.05)
    with server.http.stream("POST", "/v1/chat/completions", json=ask("a b", stream=True)) as reply:
        raw = b""
        for piece in reply.iter_raw():
            raw += piece
            if raw.count(b": ping\n\n") == 3:
                engine.gate.set()
    first, *_ = raw.split(b"\n\n")
    assert b'"role":"assistant"' in first  # headers and role come before the first token
    assert raw.count(b": ping\n\n") >= 3
    chunks = events(raw.replace(b": ping\n\n", b""))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "a b"


def test_no_pings_when_they_are_off(serve) -> None:
    engine = FakeEngine(step_s=0.1)
    server = serve(engine, sse_ping_interval=0)
    assert b"ping" not in server.post(ask("a b c", stream=True)).content


def test_a_slow_reader_gets_everything_in_fewer_chunks(serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = serve(engine)
    body = ask("count", stream=True, max_tokens=400)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        engine.gate.set()
        assert wait_until(lambda: not engine.has_unfinished())
        chunks = events(b"".join(reply.iter_raw()))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == " ".join(str(i) for i in range(1, 401))
