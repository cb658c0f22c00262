"""The offline front door on a tiny model."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime import LLM, FinishReason, SamplingParams, demo_picture_paths
from mgvq_runtime import StructuredOutputsParams as Form
from mgvq_runtime.errors import CheckpointError, ConfigError, ImageError, RequestError

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
