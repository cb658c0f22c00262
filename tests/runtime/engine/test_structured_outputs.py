"""Structured outputs in the engine: each request by itself, in any company, to a valid end."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.grammar import Grammar
from mgvq_runtime.errors import RequestError
from mgvq_runtime.request import FinishReason, Request, RequestOutput, SamplingParams
from mgvq_runtime.structured_outputs import StructuredOutputsParams as Form
from tests.runtime.engine.conftest import MakeEngine
from tests.runtime.engine.engine_runs import GREEDY, finish, prompt, prompts, run, tokens

DIGITS = Form(regex="[0-9]{2,4}-[ab]{3}")
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_round": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["colour", "count", "is_round", "tags"],
    "additionalProperties": False,
}
FREE = SamplingParams(temperature=1.0, max_tokens=60)
EIGHT = [
    replace(FREE, seed=0, structured_outputs=DIGITS),
    replace(FREE, seed=1, structured_outputs=Form(json=SCHEMA)),
    replace(FREE, seed=2, max_tokens=10, repetition_penalty=1.3, frequency_penalty=0.5),
    replace(FREE, seed=3, structured_outputs=Form(choice=["a circle", "a square"])),
    replace(GREEDY, presence_penalty=1.5, logit_bias={40: 2.5, 41: -2.5}),
    replace(FREE, seed=5, structured_outputs=DIGITS, min_tokens=6),
    replace(FREE, seed=6, structured_outputs=Form(json=SCHEMA), frequency_penalty=0.5),
    replace(GREEDY, structured_outputs=Form(grammar='start: "<" a ">"\na: "x" | "y" a')),
]


def text(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def is_valid(answer: str) -> bool:
    value = json.loads(answer)
    assert list(value) == SCHEMA["required"], "in the order of the schema"
    assert value["colour"] in ("red", "green", "blue")
    assert type(value["count"]) is int
    assert 0 <= value["count"] <= 99
    assert type(value["is_round"]) is bool
    return all(type(tag) is str and len(tag) <= 4 for tag in value["tags"])


@pytest.mark.parametrize(
    "changes",
    [{"max_num_seqs": 1}, {"max_batch_tokens": 16}, {"block_size": 2, "num_kv_blocks": 100}],
    ids=["alone", "chunks of 16", "small pool"],
)
def test_state_survives_company_chunks_and_preemption(
    make_engine: MakeEngine, changes: dict[str, int]
) -> None:
    together, other = make_engine(), make_engine(**changes)
    expected = run(together, prompts(together), EIGHT)
    found = run(other, prompts(other), EIGHT)
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}
    assert (other.num_preemptions > 0) == ("block_size" in changes)
    assert re.fullmatch("[0-9]{2,4}-[ab]{3}", text(found["0"]))
    assert is_valid(text(found["1"]))
    assert text(found["3"]) in ("a circle", "a square")
    assert re.fullmatch("[0-9]{2,4}-[ab]{3}", text(found["5"]))
    assert is_valid(text(found["6"]))
    assert re.match("<y*x?>?", text(found["7"]))


def test_a_form_that_is_complete_forces_the_end(make_engine: MakeEngine) -> None:
    engine = make_engine()
    asked = [prompt(engine, "Describe it.")] * 3
    short = replace(FREE, seed=1, max_tokens=8, structured_outputs=Form(regex="a{3}"))
    each = [short, replace(short, min_tokens=7), replace(short, ignore_eos=True)]
    found = run(engine, asked, each)
    ends = engine.tokenizer.eos_token_ids
    for index in range(2):
        assert text(found[str(index)]) == "aaa"
        assert found[str(index)][-1].finish_reason is FinishReason.STOP
        assert tokens(found[str(index)])[-1] in ends
    assert text(found["2"]) == "aaa"
    assert found["2"][-1].finish_reason is FinishReason.LENGTH
    assert set(tokens(found["2"])[3:]) <= ends


def test_max_tokens_and_stop_strings_cut_a_form(make_engine: MakeEngine) -> None:
    engine = make_engine()
    asked = [prompt(engine, "Describe it.")] * 2
    form = replace(FREE, structured_outputs=Form(regex="ab{40}"))
    found = run(engine, asked, [replace(form, max_tokens=5), replace(form, stop=("bbb",))])
    assert (text(found["0"]), found["0"][-1].finish_reason) == ("abbbb", FinishReason.LENGTH)
    assert (text(found["1"]), found["1"][-1].finish_reason) == ("a", FinishReason.STOP)


def test_a_wrong_form_is_refused_and_nothing_is_left(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = prompt(engine, "Describe it.")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"structured_outputs": Form(regex="(")}, "structured_outputs.regex"),
        ({"logit_bias": {10**9: 1.0}}, "logit_bias"),
    ]
    for fields, param in bad:
        with pytest.raises(RequestError) as caught:
            engine.add(Request("x", one, SamplingParams(**fields)))
        assert caught.value.param == param
        assert not engine.has_unfinished()


def test_a_grammar_that_gives_up_ends_its_own_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    one = prompt(engine, "Describe it.")
    engine.add(Request("bad", one, replace(FREE, structured_outputs=DIGITS)))
    engine.add(Request("good", one, GREEDY))
    sequence = engine._sequences["bad"]
    assert sequence.logits_processor is not None
    assert sequence.logits_processor.grammar is not None
    monkeypatch.setattr(sequence.logits_processor.grammar, "push", lambda token_id: False)
    found = finish(engine)
    assert [o.finish_reason for o in found["bad"]] == [FinishReason.ERROR]
    assert "too complex" in (found["bad"][0].error or "")
    assert found["bad"][0].error_code == "form_too_complex"
    assert found["good"][-1].finish_reason is FinishReason.LENGTH
    assert tokens(found["good"]) == tokens(run(engine, [one])["0"])


def test_min_tokens_holds_the_end_back(make_engine: MakeEngine) -> None:
    """A model that always wants to end does so as soon as it may."""
    engine = make_engine()
    one, end = prompt(engine, "Describe it."), min(engine.tokenizer.eos_token_ids)
    eager = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={end: 100})
    lengths = []
    for min_tokens in (0, 1, 5):
        found = run(engine, [one], replace(eager, min_tokens=min_tokens))["0"]
        assert found[-1].finish_reason is FinishReason.STOP
        lengths.append(len(tokens(found)))
    assert lengths == [1, 2, 6]


def test_grammars_of_one_form_are_separate(make_engine: MakeEngine) -> None:
    engine: Engine = make_engine()
    asked = [prompt(engine, f"Number {i}") for i in range(4)]
    params = [replace(FREE, temperature=3.0, seed=i, structured_outputs=DIGITS) for i in range(4)]
    found = run(engine, asked, params)
    answers = {text(outputs) for outputs in found.values()}
    assert len(answers) == 4
    assert all(re.fullmatch("[0-9]{2,4}-[ab]{3}", answer) for answer in answers)
    assert isinstance(engine.grammars.compile(DIGITS), Grammar)
