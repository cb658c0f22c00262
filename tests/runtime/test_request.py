"""Sampling parameters: every field is checked and named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mgvq_runtime.errors import RequestError
from mgvq_runtime.request import Prompt, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", -0.5),
        ("seed", 2**63),
        ("seed", "lucky"),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("presence_penalty", "much"),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: math.nan}),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("structured_outputs", {"regex": "a"}),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("stop", 5),
        ("stop", [b"END"]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [True]),
        ("max_tokens", np.float32(3)),
        ("top_k", np.True_),
        ("top_p", np.True_),
        ("temperature", np.float32("nan")),
        ("logit_bias", {5: 10**400}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_edges_of_the_ranges_are_taken() -> None:
    params = SamplingParams(top_p=1.0, top_k=-1, min_p=1.0, seed=-(2**63), logprobs=20)
    assert not params.is_greedy
    assert SamplingParams(temperature=0).is_greedy


def test_numbers_of_numpy_become_pythons_own() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        seed=np.uint8(7),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        logit_bias={np.int32(5): np.float16(1.5)},  # type: ignore[dict-item]
    )
    expected = SamplingParams(
        max_tokens=5, temperature=0.5, seed=7, stop_token_ids=(3, 4), logit_bias={5: 1.5}
    )
    assert repr(params) == repr(expected)


def test_none_asks_for_nothing_as_in_vllm() -> None:
    names = ("stop", "stop_token_ids", "logit_bias")
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()  # type: ignore[arg-type]


def test_an_error_does_not_repeat_what_is_long() -> None:
    for name, value in (("temperature", 10**400), ("seed", 10**5000), ("stop", ["x" * 999, ""])):
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})  # type: ignore[arg-type]
        assert caught.value.param == name
        assert len(str(caught.value)) < 200


def test_a_bias_is_the_requests_own() -> None:
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 2.0
    assert params.logit_bias == {5: 1.0}


def test_stop_takes_one_string_or_a_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_a_text_prompt_counts_up_on_all_axes() -> None:
    prompt = Prompt.from_token_ids([7, 8, 9])
    np.testing.assert_array_equal(prompt.positions, [[0, 1, 2]] * 3)
    assert (prompt.position_delta, prompt.images) == (0, ())
