"""Guessing ahead changes how many steps an answer takes, and nothing in the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_runtime.config import EngineConfig, NGramSpeculation
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.n_gram import NGramProposer
from mgvq_runtime.engine.startup import start
from mgvq_runtime.request import (
    FinishReason,
    Prompt,
    Request,
    RequestOutput,
    SamplingParams,
)
from mgvq_runtime.structured_outputs import StructuredOutputsParams
from tests.runtime.engine.engine_runs import finish, picture, prompt, prompts, tokens

SETTINGS = NGramSpeculation(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=1)
WAYS = [
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=16, seed=11, ignore_eos=True),
    SamplingParams(temperature=0.3, max_tokens=9, seed=5, logprobs=0),
    SamplingParams(temperature=0.0, max_tokens=16, repetition_penalty=1.3),
    SamplingParams(temperature=0.0, max_tokens=16, min_tokens=6),
    SamplingParams(temperature=0.0, max_tokens=16, logit_bias={40: 5.0}),
    SamplingParams(
        temperature=0.0,
        max_tokens=10,
        structured_outputs=StructuredOutputsParams(regex="(ab){2,9}c"),
    ),
]
PROCESSED = {"4", "5", "6", "7"}
"""Requests of `WAYS` that change their own logits."""


def longest_then_last(token_ids: list[int], limit: int) -> list[int]:
    """What is to be proposed, by trying every place."""
    for length in range(3, 0, -1):
        for place in range(len(token_ids) - length - 1, -1, -1):
            if token_ids[place : place + length] == token_ids[-length:]:
                found = token_ids[place + length :]
                return (found * 4)[: min(limit, 4)]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_what_followed_the_longest_repeated_run_last_is_proposed(
    token_ids: list[int], data: Any
) -> None:
    proposer = NGramProposer(SETTINGS)
    known = 0
    while known < len(token_ids):  # a request gains one token a step, or several
        known = data.draw(st.integers(known + 1, len(token_ids)))
        limit = data.draw(st.integers(0, 6))
        expected = longest_then_last(token_ids[:known], limit)
        assert list(proposer.propose(token_ids[:known], limit)) == expected


@pytest.fixture(scope="module")
def loaded() -> Any:
    return start(None, EngineConfig(device="cpu", max_model_len=512, deterministic=True))[:3]


@pytest.fixture
def make_demo(loaded: Any) -> Callable[..., Engine]:
    model, processor, resolved = loaded
    return lambda **changes: Engine(model, processor, replace(resolved, **changes))


def run_all(engine: Engine, asked: list[Prompt]) -> dict[str, list[RequestOutput]]:
    for index, one in enumerate(asked):
        engine.add(Request(str(index), one, WAYS[index % len(WAYS)]))
    return finish(engine)


@pytest.fixture(scope="module")
def expected(loaded: Any) -> dict[str, list[RequestOutput]]:
    model, processor, resolved = loaded
    engine = Engine(model, processor, resolved)
    return run_all(engine, prompts(engine))


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batch_tokens": 32}, {"block_size": 1, "num_kv_blocks": 140}],
    ids=["together", "little room", "preempted"],
)
def test_every_way_of_choosing_tokens_gives_what_it_gives_without(
    make_demo: Callable[..., Engine],
    expected: dict[str, list[RequestOutput]],
    changes: dict[str, int],
) -> None:
    """Bit for bit: tokens, text, log-probabilities and why the answer ended."""
    engine = make_demo(speculation=SETTINGS, **changes)
    for temperature in ("cold",) if changes else ("cold", "warm"):
        found = run_all(engine, prompts(engine))
        for key, wanted in expected.items():
            mine = found[key]
            assert tokens(mine) == tokens(wanted), (key, temperature)
            assert "".join(o.text for o in mine) == "".join(o.text for o in wanted)
            assert logprobs(mine) == logprobs(wanted)
            assert mine[-1].finish_reason is wanted[-1].finish_reason
            assert mine[-1].num_completion_tokens == wanted[-1].num_completion_tokens
            assert (mine[-1].num_draft_tokens == 0) or key not in PROCESSED
    assert engine.num_draft_tokens > 0
    assert changes or 0 < engine.num_accepted_tokens < engine.num_draft_tokens
    assert (engine.num_preemptions > 0) == ("num_kv_blocks" in changes)


def logprobs(outputs: list[RequestOutput]) -> list[Any]:
    return [entry for output in outputs for entry in output.logprobs or ()]


def repeating(engine: Engine, words: str) -> Prompt:
    return prompt(engine, f"Say this again and again: {words * 6}", picture(0))


def test_right_guesses_save_steps_and_are_counted(make_demo: Callable[..., Engine]) -> None:
    """A model that says one thing over and over is guessed right."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    steps, answers = [], []
    for speculation in (None, SETTINGS):
        engine = make_demo(speculation=speculation)
        always_the_same_token(engine)
        engine.add(Request("r", repeating(engine, "one two "), params))
        outputs = finish(engine)["r"]
        steps.append(len(outputs))
        answers.append(tokens(outputs))
    assert answers[0] == answers[1]
    assert steps[0] == 40
    last = outputs[-1]
    assert steps[1] == 40 - last.num_accepted_tokens
    assert last.num_accepted_tokens >= 28, "four of five tokens, once the first two are there"
    assert (engine.num_draft_tokens, engine.num_accepted_tokens) == (
        last.num_draft_tokens,
        last.num_accepted_tokens,
    )


def always_the_same_token(engine: Engine, bad_row: int | None = None) -> None:
    """Let the model say token 65, and something that is no number in one row of a longer step."""
    forward = engine._runner.run

    def run(chunks: Any) -> torch.Tensor:
        logits = torch.zeros_like(forward(chunks))
        logits[:, 65] = 1.0
        if bad_row is not None and len(logits) > bad_row:
            logits[bad_row] = torch.nan
        return logits

    engine._runner.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 6, 7, 8])
def test_an_answer_ends_at_its_length_and_at_a_stop_string_within_a_guess(
    make_demo: Callable[..., Engine], max_tokens: int
) -> None:
    engine = make_demo(speculation=SETTINGS)
    always_the_same_token(engine)
    asked = prompt(engine, "Go on.")
    piece = engine.tokenizer.token_bytes(65).decode()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request("length", asked, params))
    engine.add(Request("stop", asked, replace(params, max_tokens=50, stop=(piece * max_tokens,))))
    found = finish(engine)
    assert tokens(found["length"]) == tokens(found["stop"]) == [65] * max_tokens
    assert found["length"][-1].finish_reason is FinishReason.LENGTH
    assert found["stop"][-1].finish_reason is FinishReason.STOP
    assert "".join(output.text for output in found["stop"]) == ""


def test_a_row_that_is_not_finite_ends_the_answer_after_what_was_right(
    make_demo: Callable[..., Engine],
) -> None:
    engine = make_demo(speculation=SETTINGS)
    always_the_same_token(engine, bad_row=2)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    engine.add(Request("r", prompt(engine, "Go on."), params))
    outputs = finish(engine)["r"]
    last = outputs[-1]
    assert last.finish_reason is FinishReason.ERROR
    assert last.token_ids == (65, 65)
    assert tokens(outputs) == [65] * last.num_completion_tokens
