"""Every fault of a client gets its status and OpenAI's error body, and the server lives on."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import MODEL, RunningServer, ask, data_url, image_part, wait_until
from tests.serve.test_stream_bytes import events

URL = "messages[0].content[0].image_url.url"


def with_image(url: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": [image_part(url, **more)]}]}


def with_part(part: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}


def png_header(width: int, height: int) -> str:
    """A PNG that claims a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"\x89PNG\r\n\x1a\n" + chunk
    return "data:image/png;base64," + base64.b64encode(data).decode()


def truncated() -> str:
    raw = base64.b64decode(data_url((200, 200), "JPEG").partition(",")[2])
    return "data:image/jpeg;base64," + base64.b64encode(raw[: len(raw) // 2]).decode()


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


NOT_AN_IMAGE = "data:image/png;base64," + base64.b64encode(b"hello").decode()

BAD_REQUESTS = {
    # what a picture can be
    "not an image": (with_image(NOT_AN_IMAGE), 400, "invalid_image", URL),
    "truncated": (with_image(truncated()), 400, "invalid_image", URL),
    "100 megapixels": (with_image(png_header(10_000, 10_000)), 400, "invalid_image", URL),
    "bad base64": (with_image("data:image/png;base64,@@@"), 400, "invalid_image", URL),
    "a text file": (with_image("data:text/plain;base64,aGk="), 400, "invalid_image", URL),
    "https": (with_image("https://example.org/a.png"), 400, "remote_images_unsupported", URL),
    "HTTP": (with_image("HTTP://169.254.169.254/"), 400, "remote_images_unsupported", URL),
    "file": (with_image("file:///etc/passwd"), 403, "file_not_allowed", URL),
    "ftp": (with_image("ftp://example.org/a.png"), 400, "invalid_image_url", URL),
    "a bare path": (with_image("/etc/passwd"), 400, "invalid_image_url", URL),
    "empty url": (with_image(""), 400, "invalid_image_url", URL),
    "url is a number": (with_image(5), 400, None, URL),
    "bad detail": (
        with_image(data_url(), detail="huge"), 400, None, URL.replace("url.url", "url.detail"),
    ),
    "nine images": (
        {"model": MODEL, "messages": [{"role": "user", "content": [image_part(data_url())] * 9}]},
        400, "too_many_images", "messages",
    ),
    "a frame that is no image": (
        with_part({"type": "video", "video": [data_url(), NOT_AN_IMAGE]}),
        400, "invalid_image", "messages[0].content[0].video[1]",
    ),
    "65 frames": (
        with_part({"type": "video", "video": [data_url()] * 65}),
        400, "too_many_frames", "messages",
    ),
    "no frames": (
        with_part({"type": "video", "video": []}), 400, None, "messages[0].content[0].video",
    ),
    "a video file": (
        with_part({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}),
        400, None, "messages[0].content[0]",
    ),
    "image from the system": (
        {"model": MODEL, "messages": [{"role": "system", "content": [image_part(data_url())]}]},
        400, None, "messages[0].content",
    ),
    # what a message can be
    "image_url is a string": (
        with_part({"type": "image_url", "image_url": data_url()}),
        400, None, "messages[0].content[0].image_url",
    ),
    "unknown part": (with_part({"type": "smell"}), 400, None, "messages[0].content[0]"),
    "audio part": (with_part({"type": "input_audio"}), 400, None, "messages[0].content[0]"),
    "part without type": (with_part({"text": "x"}), 400, None, "messages[0].content[0]"),
    "part is a string": (with_part("x"), 400, None, "messages[0].content[0]"),
    "no parts": ({"model": MODEL, "messages": [{"role": "user", "content": []}]},
                 400, None, "messages[0].content"),
    "no content": ({"model": MODEL, "messages": [{"role": "user"}]},
                   400, None, "messages[0].content"),
    "null content": ({"model": MODEL, "messages": [{"role": "user", "content": None}]},
                     400, None, "messages[0].content"),
    "no messages": ({"model": MODEL, "messages": []}, 400, None, "messages"),
    "messages missing": ({"model": MODEL}, 400, None, "messages"),
    "messages a string": ({"model": MODEL, "messages": "hi"}, 400, None, "messages"),
    "unknown role": ({"model": MODEL, "messages": [{"role": "king", "content": "x"}]},
                     400, None, "messages[0].role"),
    "tool role": ({"model": MODEL, "messages": [{"role": "tool", "content": "x"}]},
                  400, None, "messages[0].role"),
    "tool calls": (
        {"model": MODEL, "messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        400, "unsupported", "messages[0]",
    ),
    # what a field can be
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, 400, None, "model"),
    "unknown model": (ask(model="gpt-9"), 404, "model_not_found", "model"),
    "too long": (ask("word " * 600), 400, "context_length_exceeded", "messages"),
    "far too long": (ask("x" * 140_000), 400, "context_length_exceeded", "messages"),
    "exactly full": (ask("word " * 511), 400, "context_length_exceeded", "messages"),
    "number as text": (ask(temperature="0.5"), 400, None, "temperature"),
    "hot": (ask(temperature=2.5), 400, None, "temperature"),
    "top_p 0": (ask(top_p=0), 400, None, "top_p"),
    "no tokens": (ask(max_tokens=0), 400, None, "max_tokens"),
    "half a token": (ask(max_tokens=0.5), 400, None, "max_tokens"),
    "true tokens": (ask(max_tokens=True), 400, None, "max_tokens"),
    "n 9": (ask(n=9), 400, None, "n"),
    "seed": (ask(seed=2**63), 400, None, "seed"),
    "many logprobs": (ask(logprobs=True, top_logprobs=21), 400, None, "top_logprobs"),
    "top without logprobs": (ask(top_logprobs=2), 400, None, "top_logprobs"),
    "stream options": (ask(stream_options={"include_usage": True}), 400, None, "stream_options"),
    "empty stop": (ask(stop=[""]), 400, None, "stop"),
    "seventeen stops": (ask(stop=[str(i) for i in range(17)]), 400, None, "stop"),
    "stop a number": (ask(stop=5), 400, None, "stop"),
    "stream a word": (ask(stream="yes"), 400, None, "stream"),
    "second answer refused": (ask("refuse", n=2), 400, None, "n"),
    "presence": (ask(presence_penalty=2.1), 400, None, "presence_penalty"),
    "frequency": (ask(frequency_penalty=-3), 400, None, "frequency_penalty"),
    "repetition": (ask(repetition_penalty=0), 400, None, "repetition_penalty"),
    "bias of a word": (ask(logit_bias={"word": 1}), 400, None, "logit_bias"),
    "bias too large": (ask(logit_bias={"5": 101}), 400, None, "logit_bias.5"),
    "bias a list": (ask(logit_bias=[5]), 400, None, "logit_bias"),
    "4097 biases": (
        ask(logit_bias={str(i): 1 for i in range(4097)}), 400, None, "logit_bias",
    ),
    "1025 stop tokens": (ask(stop_token_ids=list(range(1025))), 400, None, "stop_token_ids"),
    "more than there may be": (ask(min_tokens=5, max_tokens=4), 400, None, "min_tokens"),
    # what a form can be
    "wrong schema": (ask(response_format=json_schema({"type": "wrong"})),
                     400, None, "response_format.json_schema.schema"),
    "no schema": (ask(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
                  400, None, "response_format.json_schema.schema"),
    "schema a list": (ask(response_format=json_schema([])),
                      400, None, "response_format.json_schema.schema"),
    "no json_schema": (ask(response_format={"type": "json_schema"}),
                       400, None, "response_format.json_schema"),
    "unknown format": (ask(response_format={"type": "yaml"}), 400, None, "response_format.type"),
    "format a word": (ask(response_format="json_object"), 400, None, "response_format"),
    "wrong regex": (ask(structured_outputs={"regex": "(wrong"}),
                    400, None, "structured_outputs.regex"),
    "wrong grammar": (ask(structured_outputs={"grammar": "start: wrong"}),
                      400, None, "structured_outputs.grammar"),
    "no choice": (ask(structured_outputs={"choice": []}), 400, None, "structured_outputs.choice"),
    "two forms in one": (ask(structured_outputs={"regex": "a", "choice": ["a"]}),
                         400, None, "structured_outputs"),
    "unknown form": (ask(structured_outputs={"structural_tag": "{}"}),
                     400, None, "structured_outputs.structural_tag"),
    "wrong guided json": (ask(guided_json={"type": "wrong"}), 400, None, "guided_json"),
    "guided json a number": (ask(guided_json=5), 400, None, "guided_json"),
    "guided json no JSON": (ask(guided_json="{"), 400, None, "guided_json"),
    "wrong guided regex": (ask(guided_regex="(wrong"), 400, None, "guided_regex"),
    "wrong guided grammar": (ask(guided_grammar="start: wrong"), 400, None, "guided_grammar"),
    "guided choice": (ask(guided_choice=[1]), 400, None, "guided_choice[0]"),
    "two ways": (ask(guided_regex="a", response_format={"type": "json_object"}),
                 400, None, "guided_regex"),
    "priority": (ask(priority="high"), 400, None, "priority"),
    "cache_salt": (ask(cache_salt=5), 400, None, "cache_salt"),
    # what is known and not served
    "tools": (ask(tools=[{"type": "function"}]), 400, "unsupported", "tools"),
    "audio": (ask(audio={"voice": "x"}), 400, "unsupported", "audio"),
    "backend": (ask(guided_decoding_backend="xgrammar"),
                400, "unsupported", "guided_decoding_backend"),
    "modalities": (ask(modalities=["text", "audio"]), 400, "unsupported", "modalities"),
}  # fmt: skip


def check_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert list(response.json()) == ["error"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] == code
    assert len(error["message"]) <= 600
    assert "0x7f" not in error["message"]
    return error


def still_answers(server: RunningServer) -> None:
    response = server.post(ask("still here"))
    assert response.json()["choices"][0]["message"]["content"] == "still here"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(server: RunningServer, name: str, stream: bool) -> None:
    body, status, code, param = BAD_REQUESTS[name]
    if stream and "stream" not in name:
        body = body | {"stream": True}
    error = check_error(server.post(body), status, code)
    assert error["param"] == param
    still_answers(server)
    assert server.engine.has_unfinished() is False


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "json_invalid"),
        (b"{", "json_invalid"),
        (b"not json", "json_invalid"),
        (b"[" * 100_000, "json_invalid"),
        (b'{"model": "\xff"}', "json_invalid"),
        (b'{"model": "x", "messages": [{"role": "user", "content": "\\ud800"}]}', "json_invalid"),
        (b"[]", ""),
        (b"null", ""),
        (b'"text"', ""),
        (b'{"model": "test-model", "messages": [{"role":"user","content":"x"}], "top_p": NaN}', ""),
        (b"{" + b" " * 300_000, "json_invalid"),
    ],
)
def test_malformed_json(server: RunningServer, raw: bytes, word: str) -> None:
    response = server.post_raw(raw, content_type="application/json")
    assert word in check_error(response, 400)["message"]
    still_answers(server)


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "", None])
def test_wrong_content_type(server: RunningServer, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = server.http.post("/v1/chat/completions", content=b"{}", headers=headers)
    check_error(response, 415, "unsupported_media_type")


def test_json_with_a_charset_is_json(server: RunningServer) -> None:
    raw = json.dumps(ask("é"), ensure_ascii=False).encode()
    response = server.post_raw(raw, content_type="Application/JSON; charset=utf-8")
    assert response.json()["choices"][0]["message"]["content"] == "é"


@pytest.mark.parametrize("chunked", [False, True])
def test_body_too_large(serve, chunked: bool) -> None:
    server = serve(max_body_mb=0.1)
    raw = b'{"model": "' + b"x" * 150_000 + b'"}'
    response = server.post_raw(iter([raw]) if chunked else raw, content_type="application/json")
    check_error(response, 413, "body_too_large")
    still_answers(server)


def test_unknown_route_and_method(server: RunningServer) -> None:
    assert check_error(server.http.get("/v2"), 404)["type"] == "not_found_error"
    response = server.http.get("/v1/chat/completions")
    check_error(response, 405)
    assert response.headers["allow"] == "POST"


def test_context_overflow_tells_both_numbers(server: RunningServer) -> None:
    error = check_error(server.post(ask("word " * 600)), 400, "context_length_exceeded")
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (601, 512)
    assert "maximum context length is 512 tokens" in error["message"]


def test_pydantic_words_stay_in_the_message(server: RunningServer) -> None:
    error = check_error(server.post(ask(seed=-(2**63) - 1)), 400)
    assert "greater_than_equal" in error["message"]


def test_a_request_that_fails_in_the_engine_fails_alone(server: RunningServer) -> None:
    error = check_error(server.post(ask("nan")), 500, "internal_error")
    assert error["type"] == "server_error"
    still_answers(server)


def test_a_form_that_cannot_be_followed_on_is_the_clients_fault(server: RunningServer) -> None:
    fields = {"guided_regex": "(a{9}){9}"}
    error = check_error(server.post(ask("a tangle", **fields)), 400, "form_too_complex")
    assert (error["message"], error["param"]) == ("too complex to follow", "guided_regex")
    stream = server.post(ask("a tangle", stream=True, **fields))
    assert stream.status_code == 200
    assert events(stream.content)[-1] == {"error": error}
    still_answers(server)


def test_forms_that_take_long_hold_up_forms_alone(server: RunningServer) -> None:
    gate = server.engine.grammars.gate
    gate.clear()
    known = ask("x", guided_regex="known")
    assert server.post(known).status_code == 200
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(server.post, ask("x", guided_regex=f"slow{i}")) for i in range(4)]
        try:
            assert wait_until(lambda: server.server._app.service.admission.num_open == 4)
            still_answers(server)
            assert server.post(known).status_code == 200, "it needs no compiling"
        finally:
            gate.set()
        assert [one.result().status_code for one in slow] == [200] * 4


def test_pictures_that_memory_does_not_hold_are_refused(server: RunningServer) -> None:
    error = check_error(server.post(ask("gigabytes")), 400, "images_too_large")
    assert "fewer or smaller images" in error["message"]
    assert error["param"] == "messages"
    still_answers(server)


def test_a_bug_while_adding_fails_alone_and_says_nothing(server: RunningServer) -> None:
    response = server.post(ask("trip"))
    check_error(response, 500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"
    still_answers(server)


def test_clients_raise_their_own_exceptions(client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**ask(model="gpt-9"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask(tools=[{"type": "function"}]))
    assert caught.value.param == "tools"
    assert caught.value.request_id


def test_an_answer_that_takes_too_long_is_not_asked_for_again(server: RunningServer) -> None:
    response = server.post(ask("late"))
    error = check_error(response, 503, "request_timeout")
    assert "within 600 seconds" in error["message"]
    assert response.headers["x-should-retry"] == "false"
