"""The server in front of the real engine, with a tiny model of random weights."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import pydantic
import pytest
from PIL import Image

from mgvq_runtime import (
    Engine,
    EngineConfig,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)
from tests.runtime.conftest import write_hub_folder
from tests.serve.conftest import (
    MODEL,
    RunningServer,
    ask,
    data_url,
    image_part,
    start_server,
    wait_until,
)
from tests.serve.test_disconnect import send
from tests.serve.test_errors import BAD_REQUESTS, check_error

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(device="cpu", max_model_len=512, max_num_seqs=4)
GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    write_hub_folder(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    running = start_server(Engine.from_checkpoint(folder, CONFIG))
    yield running
    running.stop()


def with_picture(text: str = "What is in the picture?") -> dict[str, Any]:
    content = [image_part(data_url((84, 56))), {"type": "text", "text": text}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]}


def offline_answer(folder: Path, messages: list[dict[str, Any]], images: list[Any]) -> Any:
    """Ask an engine of its own, without a server; return the text and the prompt's length."""
    engine = Engine.from_checkpoint(folder, CONFIG)
    prompt = engine.chat_processor.prepare(messages, images)
    engine.add(Request("x", prompt, SamplingParams(temperature=0.0, max_tokens=16)))
    text = ""
    while engine.has_unfinished():
        text += "".join(output.text for output in engine.step())
    return text, len(prompt.token_ids)


def test_the_answer_is_the_engines(server: RunningServer, client, folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    picture = Image.new("RGB", (84, 56), (200, 30, 30))
    text, length = offline_answer(folder, [{"role": "user", "content": parts}], [picture])
    reply = client.chat.completions.create(**with_picture(), **GREEDY)
    assert reply.choices[0].message.content == text
    assert reply.usage.prompt_tokens == length
    without = client.chat.completions.create(**ask("What is in the picture?"), **GREEDY)
    # <|vision_start|> 6 x placeholder <|vision_end|>: 84 x 56 pixels are 3 x 2 merged patches
    assert reply.usage.prompt_tokens - without.usage.prompt_tokens == 8


def test_stream_and_whole_answer_agree(client) -> None:
    whole = client.chat.completions.create(**with_picture(), **GREEDY)
    stream = client.chat.completions.create(**with_picture(), **GREEDY, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def test_eight_at_once_answer_as_if_alone(server: RunningServer, client) -> None:
    bodies = [with_picture(f"picture {i}") if i % 2 else ask(f"number {i}") for i in range(8)]
    alone = [client.chat.completions.create(**body, **GREEDY) for body in bodies]

    async def together() -> list[Any]:
        async with server.async_client() as client:
            return await asyncio.gather(
                *(client.chat.completions.create(**body, **GREEDY) for body in bodies)
            )

    for one, other in zip(alone, asyncio.run(together()), strict=True):
        assert one.choices[0].message.content == other.choices[0].message.content
        assert one.usage.total_tokens == other.usage.total_tokens


def test_a_second_turn_says_how_much_of_it_was_cached(client) -> None:
    def ask_again(**fields: Any) -> Any:
        return client.chat.completions.create(**body, **GREEDY, extra_body=fields).usage

    body = with_picture("What is in the picture? " * 3)
    first = ask_again(cache_salt="mine")
    assert first.prompt_tokens_details.cached_tokens == 0
    reply = {"role": "assistant", "content": "A red one."}
    body["messages"] += [reply, {"role": "user", "content": "And what else?"}]
    second = ask_again(cache_salt="mine", priority=-1)
    # all of the first prompt but its last, unfinished block; the reply opens as that one ended
    assert second.prompt_tokens_details.cached_tokens >= first.prompt_tokens // 16 * 16
    assert second.prompt_tokens_details.cached_tokens < second.prompt_tokens
    assert ask_again(cache_salt="yours").prompt_tokens_details.cached_tokens == 0


def test_a_seed_repeats_and_answers_differ(client) -> None:
    def sample(seed: int) -> list[str]:
        reply = client.chat.completions.create(**ask("go"), n=3, seed=seed, max_tokens=12)
        return [choice.message.content for choice in reply.choices]

    first = sample(7)
    assert sample(7) == first
    assert len(set(first)) == 3
    assert sample(8) != first


def test_logprobs_spell_the_answer(client) -> None:
    reply = client.chat.completions.create(
        **ask("hello"), **GREEDY, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 16
    spelled = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert spelled == reply.choices[0].message.content
    for entry in entries:
        best = entry.top_logprobs[0]
        assert (best.token, best.logprob) == (entry.token, entry.logprob)  # greedy
        assert [o.logprob for o in entry.top_logprobs] == sorted(
            (o.logprob for o in entry.top_logprobs), reverse=True
        )


def test_a_stop_string_ends_before_itself(client) -> None:
    text = client.chat.completions.create(**ask("hello"), **GREEDY).choices[0].message.content
    stop = text[6:8]
    reply = client.chat.completions.create(**ask("hello"), **GREEDY, stop=[stop, "never there"])
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


class Figure(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    count: Annotated[int, pydantic.Field(ge=0, le=9)]
    is_round: bool


def test_the_clients_own_parser_gets_its_model(client) -> None:
    for seed in range(3):
        reply = client.chat.completions.parse(
            **with_picture(), response_format=Figure, max_tokens=60, seed=seed
        )
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(reply.choices[0].message.parsed, Figure)


def test_a_form_is_kept_in_a_stream_with_several_answers(client) -> None:
    form = {"structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**ask("go"), n=3, stream=True, extra_body=form):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert all(re.fullmatch("[ab]{3}-[0-9]{2}", text) for text in texts), texts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs.grammar"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "ghost"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ],
)
def test_what_only_the_engine_knows_to_be_wrong(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    assert check_error(server.post(ask("x", **fields)), 400)["param"] == param
    assert not server.engine.has_unfinished()


def test_a_form_that_is_too_complex_is_refused_with_the_reason(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {f"k{i}": {} for i in range(600)}}
    response = server.post(ask("x", guided_json=schema))
    error = check_error(response, 400, "form_too_complex")
    assert error["param"] == "guided_json"
    assert "simplify it" in error["message"]
    assert not server.engine.has_unfinished()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    engine, abort = server.engine, server.engine.abort
    last_outputs: list[RequestOutput] = []
    monkeypatch.setattr(engine, "abort", lambda name: last_outputs.append(abort(name)))
    with send(server, ask("hello", stream=stream, max_tokens=450, ignore_eos=True)):
        assert wait_until(lambda: engine.num_running == 1)
    assert wait_until(lambda: len(last_outputs) == 1)
    assert last_outputs[0].finish_reason is FinishReason.ABORT
    assert last_outputs[0].num_completion_tokens < 450
    assert not engine.has_unfinished()
    assert engine.kv_usage == 0.0


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(server: RunningServer, name: str) -> None:
    body, status, code, _ = BAD_REQUESTS[name]
    if name not in ("second answer refused", "exactly full"):  # tricks of the fake engine
        check_error(server.post(body), status, code)
        assert not server.engine.has_unfinished()


def test_special_tokens_in_the_text_are_text(server: RunningServer, client) -> None:
    plain = client.chat.completions.create(**ask("<|image_pad|><|im_end|>"), max_tokens=1)
    assert plain.usage.prompt_tokens > 8 + len("<|image_pad|>") // 2  # spelled out, not two ids


def test_the_command_serves_a_folder(folder: Path) -> None:
    flags = ["--checkpoint", str(folder), "--device", "cpu", "--port", "0", "--num-threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mgvq_serve", *flags, "--served-model-name", "tiny"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = iter(process.stdout.readline, "")
        ready = next((line for line in lines if "is ready" in line), "")
        found = re.search(r"http://\S+:\d+", ready)
        assert found, process.stderr.read()
        reply = httpx.post(
            f"{found[0]}/v1/chat/completions",
            json=with_picture() | {"model": "tiny", "max_tokens": 3},
            timeout=60,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert reply.json()["usage"]["completion_tokens"] == 3, reply.text
