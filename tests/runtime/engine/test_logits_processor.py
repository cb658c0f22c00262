"""Bias, penalties, min_tokens: against transformers' processors and against their formulas."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mgvq_runtime.engine.grammar import GrammarCompiler
from mgvq_runtime.engine.logits_processor import (
    LogitsProcessor,
    make_logits_processor,
    process_logits,
)
from mgvq_runtime.engine.output import OutputText
from mgvq_runtime.engine.sampler import filtered_probs, sample
from mgvq_runtime.engine.sequence import Sequence
from mgvq_runtime.errors import RequestError
from mgvq_runtime.request import Prompt, Request, SamplingParams
from tests.runtime.engine.test_sampler import NoText

V = 24
EOS = 5


class Ends:
    """A tokenizer of which only the end tokens are asked."""

    eos_token_ids = frozenset([EOS])


GRAMMARS = GrammarCompiler(Ends(), V)  # type: ignore[arg-type]


def make(params: SamplingParams, prompt: list[int], answer: list[int]) -> LogitsProcessor | None:
    request = Request("r", Prompt.from_token_ids(prompt), params)
    processor = make_logits_processor(request, GRAMMARS)
    for token_id in answer:
        assert processor is None or processor.push(token_id)
    return processor


def row(seed: int) -> torch.Tensor:
    return torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * 3


token_lists = st.lists(st.integers(0, V - 1), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    token_lists,
    token_lists,
    st.dictionaries(st.integers(0, V - 1), st.floats(-20, 20), max_size=3),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.integers(0, 14),
    st.tuples(
        st.sampled_from([0.4, 1.0, 1.7]),
        st.sampled_from([0, 3, 9]),
        st.sampled_from([0.6, 0.95, 1.0]),
        st.sampled_from([0.0, 0.2]),
    ),
)
def test_the_distribution_is_that_of_transformers(
    seed: int,
    prompt: list[int],
    answer: list[int],
    bias: dict[int, float],
    repetition_penalty: float,
    min_tokens: int,
    filters: tuple[float, int, float, float],
) -> None:
    temperature, top_k, top_p, min_p = filters
    theirs: list[Any] = [
        RepetitionPenaltyLogitsProcessor(repetition_penalty),
        MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, [EOS], device="cpu"),
        TemperatureLogitsWarper(temperature),
    ]
    if bias:
        theirs.insert(0, SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()}))
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [MinPLogitsWarper(min_p)] if min_p else []
    input_ids = torch.tensor([prompt + answer])
    expected = LogitsProcessorList(theirs)(input_ids, row(seed)).softmax(-1)
    params = SamplingParams(
        repetition_penalty=repetition_penalty, logit_bias=bias, min_tokens=min_tokens
    )
    processed = process_logits(row(seed), [make(params, prompt, answer)])
    found = filtered_probs(processed, *[[value] for value in filters])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@settings(deadline=None)
@given(
    st.integers(0, 1000),
    token_lists,
    token_lists,
    st.floats(0.5, 2.0),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_are_their_formula(
    seed: int,
    prompt: list[int],
    answer: list[int],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence
    )
    found = process_logits(row(seed), [make(params, prompt, answer)])[0].tolist()
    counts = Counter(answer)
    for token, old in enumerate(row(seed)[0].tolist()):
        expected = old
        if token in prompt or token in answer:
            expected = old / repetition if old > 0 else old * repetition
        expected -= frequency * counts[token] + presence * (token in answer)
        assert found[token] == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_rows_do_not_touch_each_other_and_the_models_logits_stay() -> None:
    logits = torch.cat([row(seed) for seed in range(6)])
    before = logits.clone()
    each = [
        make(SamplingParams(repetition_penalty=2.0), [1, 2], [3]),
        None,
        make(SamplingParams(logit_bias={7: 5.0, 8: -100}), [1], []),
        make(SamplingParams(frequency_penalty=1.0, min_tokens=2), [1], [4, 4, 4]),
        make(SamplingParams(min_tokens=3, stop_token_ids=(9, 10**6)), [1], [2]),
        make(SamplingParams(presence_penalty=-1.0, logit_bias={0: 1}), [1], []),
    ]
    together = process_logits(logits, each)
    assert torch.equal(logits, before)
    for index, one in enumerate(each):
        alone = process_logits(logits[index : index + 1], [one])
        assert torch.equal(together[index], alone[0])
    assert torch.equal(together[1], logits[1])
    assert (together[4] == -math.inf).nonzero().flatten().tolist() == [EOS, 9]
    assert not (together[3] == -math.inf).any()
    assert process_logits(logits, [None] * 6) is logits


def test_what_changes_nothing_has_no_processor() -> None:
    assert make(SamplingParams(top_k=3, temperature=0.3, stop="x"), [1], []) is None


def test_end_tokens_that_are_ignored_are_not_held_back() -> None:
    ignoring = make(SamplingParams(min_tokens=2, ignore_eos=True), [1], [])
    assert torch.equal(process_logits(row(0), [ignoring]), row(0))


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="24 tokens") as caught:
        make(SamplingParams(logit_bias={V: 1.0}), [1], [])
    assert caught.value.param == "logit_bias"


def test_draws_follow_the_changed_distribution() -> None:
    """Chi-squared over 4000 draws of 5 tokens; 18.5 is exceeded once in a thousand runs."""
    num_draws, prompt, answer = 4000, [3], [0, 2, 2]
    logits = [0.5, 1.2, 1.5, -0.4, 0.1]
    params = SamplingParams(
        temperature=0.8,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        logit_bias={4: 0.7},
    )
    weights = []
    for token, logit in enumerate(logits):
        value = logit + (0.7 if token == 4 else 0.0)
        if token in (0, 2, 3):
            value = value / 1.3 if value > 0 else value * 1.3
        value -= 0.2 * answer.count(token) + 0.3 * (token in answer)
        weights.append(math.exp(value / 0.8))
    expected = torch.tensor(weights) / sum(weights) * num_draws
    processor = LogitsProcessor(params, prompt, [])
    for token_id in answer:
        processor.push(token_id)
    request = Request("r", Prompt.from_token_ids(prompt + answer), params)
    output = OutputText(NoText(), params, (), 5)
    sequences = [Sequence(request, 5, seed, None, output) for seed in range(num_draws)]
    for sequence in sequences:
        sequence.logits_processor = processor
    drawn = sample(torch.tensor([logits]).repeat(num_draws, 1), sequences)
    counts = torch.bincount(torch.tensor([one.token_id for one in drawn]), minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5


def test_greedy_and_logprobs_with_a_bias() -> None:
    """The choice sees the bias; log-probabilities are the model's own."""
    params = SamplingParams(temperature=0.0, logit_bias={3: 100.0}, logprobs=1)
    request = Request("r", Prompt.from_token_ids([1]), params)
    sequence = Sequence(request, 5, 0, None, OutputText(NoText(), params, (), 5))
    sequence.logits_processor = make(params, [1], [])
    [drawn] = sample(row(2), [sequence])
    assert drawn.token_id == 3
    expected = row(2).log_softmax(-1)[0]
    assert drawn.logprob == pytest.approx(float(expected[3]))
    assert drawn.top[0][0] == int(expected.argmax())
