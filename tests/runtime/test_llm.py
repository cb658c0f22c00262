"""The offline front door on a tiny model."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime import LLM, FinishReason, SamplingParams, demo_picture_paths
from mgvq_runtime import StructuredOutputsParams as Form
from mgvq_runtime import llm as llm_module
from mgvq_runtime.errors import CheckpointError, ConfigError, ImageError, RequestError
from mgvq_runtime.interrupts import collect_ctrl_c, hold_ctrl_c

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
QUESTION = "What is this?"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def llm(tiny_qwen2_vl_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_qwen2_vl_folder, device="cpu", max_model_len=256, max_num_seqs=2) as one:
        yield one


def ask(text: str, *pictures: Any) -> list[dict[str, Any]]:
    parts = [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_one_conversation_gives_one_reply(llm: LLM) -> None:
    reply = llm.chat(ask(QUESTION, PICTURE), GREEDY)
    assert len(reply.token_ids) == reply.usage.completion_tokens == 6
    assert reply.finish_reason is FinishReason.LENGTH
    prompt = llm.engine.chat_processor.prepare(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
            }
        ],
        [PICTURE],
    )
    assert reply.usage.prompt_tokens == len(prompt.token_ids)
    assert reply.text == llm.engine.tokenizer.decode(reply.token_ids)
    assert (reply.logprobs, reply.error) == (None, None)


def test_many_conversations_come_back_in_order(llm: LLM) -> None:
    asked = [ask(f"Question {i}", *[PICTURE] * (i % 2)) for i in range(9)]
    together = llm.chat(asked, GREEDY)
    assert together == [llm.chat(one, GREEDY) for one in asked]
    each = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in range(1, 10)]
    assert [r.usage.completion_tokens for r in llm.chat(asked, each)] == list(range(1, 10))
    assert llm.chat([], GREEDY) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_list_shows_its_progress_on_a_terminal(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(file: io.StringIO, asked: Any, **options: Any) -> str:
        monkeypatch.setattr("sys.stderr", file)
        llm.chat(asked, GREEDY, **options)
        return file.getvalue()

    many = [ask("a"), ask("b"), ask("c")]
    assert "3/3" in shown(Terminal(), many)
    assert shown(Terminal(), many, use_tqdm=False) == ""
    assert shown(Terminal(), many[0]) == ""
    assert shown(io.StringIO(), many, use_tqdm=True) == ""


def test_a_form_in_a_list_is_each_conversations_own(llm: LLM) -> None:
    forms = [Form(regex="[0-9]{3}"), Form(regex="("), Form(choice=["left", "right"])]
    params = [SamplingParams(structured_outputs=form, max_tokens=20) for form in forms]
    digits, wrong, side = llm.chat([ask(QUESTION, PICTURE)] * 3, params)
    assert re.fullmatch("[0-9]{3}", digits.text)
    assert side.text in ("left", "right")
    assert wrong.finish_reason is FinishReason.ERROR
    assert "unclosed group" in (wrong.error or "")
    with pytest.raises(RequestError, match="unclosed group"):
        llm.chat(ask(QUESTION), params[1])


def test_the_demonstration_model_answers_in_json() -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    params = [
        SamplingParams(structured_outputs=form, temperature=1.0, seed=seed, max_tokens=200)
        for seed, form in enumerate([Form(json=schema)] * 3 + [Form(json_object=True)] * 3)
    ]
    with LLM(device="cpu", max_model_len=512) as demo:
        replies = demo.chat([ask(QUESTION, path) for path in demo_picture_paths()], params)
    whole = [reply for reply in replies if reply.finish_reason is FinishReason.STOP]
    assert len(whole) >= 3
    for reply in replies[:3]:
        value = json.loads(reply.text)
        assert list(value) == ["colour", "count"]
        assert value["colour"] in ("red", "blue")
        assert type(value["count"]) is int
    assert all(isinstance(json.loads(reply.text), dict) for reply in whole)


def test_a_bad_request_in_a_list_fails_alone_and_alone_it_raises(llm: LLM) -> None:
    bad = [ask("x" * 5000), ask("?", "/nowhere.png"), [{"role": "user", "content": 5}]]
    replies = llm.chat([*bad, ask("fine")], GREEDY)
    assert [reply.finish_reason.value for reply in replies] == ["error"] * 3 + ["length"]
    assert "at most 256" in (replies[0].error or "")
    assert "/nowhere.png" in (replies[1].error or "")
    with pytest.raises(RequestError):
        llm.chat(bad[0], GREEDY)
    with pytest.raises(ImageError):
        llm.chat(bad[1], GREEDY)
    with pytest.raises(RequestError, match="2 sampling parameters for 1"):
        llm.chat([ask("fine")], [GREEDY, GREEDY])
    assert not llm.engine.has_unfinished()


def test_a_pil_image_that_cannot_be_read_fails_alone(llm: LLM) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    damaged = Image.open(io.BytesIO(file.getvalue()[:8000]))
    asked = [ask(QUESTION, PICTURE), ask(QUESTION, damaged), ask(QUESTION, Image.new("L", (0, 5)))]
    good, *bad = llm.chat(asked, GREEDY)
    assert good == llm.chat(asked[0], GREEDY)
    assert [reply.finish_reason for reply in bad] == [FinishReason.ERROR] * 2
    with pytest.raises(ImageError):
        llm.chat(asked[2], GREEDY)


def test_none_among_the_sampling_parameters_is_the_defaults(llm: LLM) -> None:
    first, second = llm.chat([ask("a"), ask("b")], [GREEDY, None])
    assert first == llm.chat(ask("a"), GREEDY)
    assert 1 <= second.usage.completion_tokens <= SamplingParams().max_tokens


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, 5, [{"temperature": 0.0}]])
def test_other_sampling_parameters_are_refused_by_their_type(llm: LLM, wrong: Any) -> None:
    for call in (llm.generate, llm.chat, lambda asked, how: next(llm.stream(asked, how))):
        asked: Any = "Hello" if call == llm.generate else ask("Hello")
        with pytest.raises(RequestError, match="must be SamplingParams.* got (dict|int)") as caught:
            call(asked, wrong)
        assert caught.value.param == "sampling_params"


@pytest.mark.parametrize("wrong", ["Hello", ask("Hello")[0], None, iter([])])
def test_what_is_no_conversation_is_refused_and_not_read_by_letters(llm: LLM, wrong: Any) -> None:
    for call in (llm.chat, lambda messages: next(llm.stream(messages))):
        with pytest.raises(RequestError, match=r'a list of {"role": .* LLM\.generate'):
            call(wrong)
    (reply,) = llm.chat(["Hello"], GREEDY)  # type: ignore[list-item]
    assert "must be a list of" in (reply.error or "")


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """As in a program at a terminal; whoever runs the tests may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("place", ["_scheduler.add", "_runner.run", "abort"])
@pytest.mark.parametrize("how", ["chat", "many", "stream"])
def test_after_ctrl_c_nothing_runs_on_and_the_next_call_is_served(
    llm: LLM, place: str, how: str
) -> None:
    """Whatever the engine is at; and that is finished first."""
    path = f"_engine.{place}".split(".")
    owner: Any = llm
    for name in path[:-1]:
        owner = getattr(owner, name)
    original = getattr(owner, path[-1])
    begun, finished = [], []

    def pressed(*arguments: Any) -> Any:
        begun.append(arguments)
        signal.raise_signal(signal.SIGINT)
        result = original(*arguments)
        finished.append(arguments)
        return result

    calls: dict[str, Callable[[], Any]] = {
        "chat": lambda: llm.chat(ask("a"), GREEDY),
        "many": lambda: llm.chat([ask(str(i)) for i in range(9)], GREEDY),
        "stream": lambda: list(llm.stream(ask("a"), GREEDY)),
    }
    expected = llm.chat(ask("a"), GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, path[-1], pressed)
        with pytest.raises(KeyboardInterrupt):
            calls[how]()
    assert begun == finished, "it was held"
    assert not llm.engine.has_unfinished()
    assert llm._mail == {}
    assert llm.chat(ask("a"), GREEDY) == expected


def test_a_handler_of_the_users_own_does_not_end_the_answer(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        expected = llm.generate("Hello", GREEDY)
        run = llm.engine._runner.run
        monkeypatch.setattr(
            llm.engine._runner, "run", lambda chunks: (signal.raise_signal(2), run(chunks))[1]
        )
        assert llm.generate("Hello", GREEDY) == expected
        assert seen == [signal.SIGINT] * 6
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_is_kept_back_by_any_block_and_in_the_main_thread_only() -> None:
    done: list[str] = []

    @hold_ctrl_c()
    def work(*, fails: bool = False) -> None:
        with collect_ctrl_c() as pressed, hold_ctrl_c():
            signal.raise_signal(signal.SIGINT)
        assert pressed == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        done.append("worked")
        if fails:
            raise ValueError("an error does not swallow it")

    for fails in (False, True):
        with pytest.raises(KeyboardInterrupt):
            work(fails=fails)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: done.append(str(_handler_inside())))
    thread.start()
    thread.join()
    assert done == ["worked", "worked", str(before)]


@pytest.mark.usefixtures("ctrl_c_raises")
def test_a_loop_hears_of_a_ctrl_c_once() -> None:
    heard: list[str] = []

    async def work() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, heard.append, "once")
        with hold_ctrl_c():
            signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0.05)

    asyncio.run(work())
    assert heard == ["once"]


def test_a_second_ctrl_c_leaves_nothing_running_either(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        n = 0

        def __init__(self, **_: Any) -> None:
            pass

        def update(self, _: int) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm_module, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        llm.chat([ask("a"), ask("b")], GREEDY)
    assert not llm.engine.has_unfinished()
    assert llm._mail == {}


def _handler_inside() -> Any:
    with hold_ctrl_c(), collect_ctrl_c():
        return signal.getsignal(signal.SIGINT)


def test_a_stream_is_the_reply_in_pieces_and_closing_it_aborts(llm: LLM) -> None:
    whole = llm.chat(ask("Describe it."), GREEDY)
    pieces = list(llm.stream(ask("Describe it."), GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason is None for piece in pieces] == [True] * 5 + [False]
    stream = llm.stream(ask("Describe it."), GREEDY)
    next(stream)
    assert llm.engine.has_unfinished()
    stream.close()
    assert not llm.engine.has_unfinished()


def test_streams_and_chats_can_be_interleaved(llm: LLM) -> None:
    asked = [ask("Describe it."), ask(QUESTION, PICTURE), ask("0123")]
    whole = [llm.chat(one, GREEDY).text for one in asked]
    first, second = llm.stream(asked[0], GREEDY), llm.stream(asked[1], GREEDY)
    texts = [next(first).text, next(second).text]
    assert llm.chat(asked[2], GREEDY).text == whole[2]
    texts[0] += "".join(piece.text for piece in first)
    texts[1] += "".join(piece.text for piece in second)
    assert texts == whole[:2]
    assert not llm.engine.has_unfinished()


def test_generate_continues_plain_text(llm: LLM) -> None:
    text = "The quick brown fox"
    reply = llm.generate(text, GREEDY)
    assert reply.usage.prompt_tokens == len(llm.engine.tokenizer.encode(text))
    assert llm.generate([text, "Describe"], GREEDY)[0] == reply


def test_logprobs_are_joined(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
    reply = llm.chat(ask("Describe it."), params)
    assert reply.logprobs is not None
    assert tuple(entry.token_id for entry in reply.logprobs) == reply.token_ids


def test_a_typo_in_a_setting_is_refused(tiny_qwen2_vl_folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(tiny_qwen2_vl_folder, max_model_length=3)


def test_a_missing_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(tmp_path / "nowhere")


def test_a_closed_llm_says_so(tiny_qwen2_vl_folder: Path) -> None:
    one = LLM(tiny_qwen2_vl_folder, device="cpu", max_model_len=64)
    one.close()
    one.close()
    with pytest.raises(RuntimeError, match="was closed"):
        one.chat(ask("?"), GREEDY)
