"""Sampling: against a plain definition, by seed and position alone, and with damaged rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_runtime.engine.output import OutputText
from mgvq_runtime.engine.sampler import BAD_ROW, filtered_probs, sample, uniform
from mgvq_runtime.engine.sequence import Sequence
from mgvq_runtime.request import Prompt, Request, SamplingParams


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(params: SamplingParams, seed: int = 0, num_tokens: int = 3) -> Sequence:
    request = Request("r", Prompt.from_token_ids([1] * num_tokens), params)
    output = OutputText(NoText(), params, (), 5)
    return Sequence(request, 5, seed, placeholder_ids=(), output=output)


def plain_filter(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[float]:
    """The definition, token by token."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept = order[:top_k] if 0 < top_k < len(order) else order
    total = sum(weights[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if nucleus and mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    best = weights[order[0]]
    final = [i for i in nucleus if weights[i] >= min_p * best]
    total = sum(weights[i] for i in final)
    return [weights[i] / total if i in final else 0.0 for i in range(len(logits))]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(-1, 13),
    st.sampled_from([0.11, 0.53, 0.92, 1.0]),
    st.sampled_from([0.0, 0.07, 0.6]),
)
def test_filters_agree_with_their_definition(
    levels: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = [level / 7 for level in levels]
    found = filtered_probs(torch.tensor([logits]), [temperature], [top_k], [top_p], [min_p])
    expected = plain_filter(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_rows_with_different_parameters_do_not_touch_each_other() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = filtered_probs(logits, [0.5, 1.0, 2.0], [0, 3, 10], [0.9, 1.0, 0.5], [0.0, 0.1, 0.0])
    for row, how in enumerate([(0.5, 0, 0.9, 0.0), (1.0, 3, 1.0, 0.1), (2.0, 10, 0.5, 0.0)]):
        alone = filtered_probs(logits[row : row + 1], *[[value] for value in how])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_greedy_takes_the_first_best() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [2.0, 1.0, 0.0]])
    greedy = sequence(SamplingParams(temperature=0.0))
    assert [one.token_id for one in sample(logits, [greedy, greedy])] == [1, 0]


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.5)

    def draw(seed: int, position: int, others: int) -> int:
        rows = torch.cat([logits, torch.randn(others, 100)])
        sequences = [sequence(params, seed, position)]
        sequences += [sequence(params, 99 + i, 3 + i) for i in range(others)]
        return sample(rows, sequences)[0].token_id

    assert len({draw(7, 5, others) for others in range(4)}) == 1
    assert len({draw(7, position, 0) for position in range(1, 30)}) > 5
    assert len({draw(seed, 5, 0) for seed in range(30)}) > 5


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 4000 draws of 5 tokens; 18.5 is exceeded once in a thousand runs."""
    probs = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    rows = probs.log().repeat(4000, 1)
    params = SamplingParams()
    drawn = sample(rows, [sequence(params, seed) for seed in range(4000)])
    counts = torch.bincount(torch.tensor([one.token_id for one in drawn]), minlength=5)
    chi_squared = ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum()
    assert chi_squared < 18.5


def test_uniform_numbers_lie_in_range_for_any_seed() -> None:
    seeds = [-(2**63), -1, 0, 1, 2**63 - 1]
    assert all(0.0 <= uniform(seed, position) < 1.0 for seed in seeds for position in range(50))
    assert len({uniform(seed, 3) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 9e-6, 1e-5])
def test_the_smallest_temperatures_take_the_best(temperature: float) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    params = SamplingParams(temperature=temperature, top_p=0.9)
    assert params.is_greedy == (temperature < 1e-5)
    assert {sample(logits, [sequence(params, seed)])[0].token_id for seed in range(20)} == {1}


def test_probabilities_that_are_not_finite_give_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temperature that is 0 in float32, where nobody takes it for greedy."""
    monkeypatch.setattr("mgvq_runtime.request.SAMPLING_EPS", 0.0)
    params = [SamplingParams(temperature=one, logprobs=1) for one in (1e-46, 1.0)]
    logits = torch.tensor([[0.0, 50.0, 1.0]]).repeat(2, 1)
    bad, good = sample(logits, [sequence(one) for one in params])
    assert (bad.token_id, bad.top, good.token_id) == (BAD_ROW, (), 1)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((64, 20), -math.inf)
    logits[:, 7] = 0.0
    params = SamplingParams(temperature=2.0)
    drawn = sample(logits, [sequence(params, seed) for seed in range(64)])
    assert {one.token_id for one in drawn} == {7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gets_no_token_and_harms_no_other(
    bad: float, temperature: float
) -> None:
    logits = torch.zeros(3, 10)
    logits[:, 4] = 50.0
    logits[1, 2] = bad
    params = SamplingParams(temperature=temperature, logprobs=2)
    samples = sample(logits, [sequence(params)] * 3)
    assert [one.token_id for one in samples] == [4, BAD_ROW, 4]
    assert [len(one.top) for one in samples] == [2, 0, 2]


def test_logprobs_are_those_of_the_unfiltered_distribution() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(3)) * 3
    greedy = sequence(SamplingParams(temperature=0.0, logprobs=3))
    chosen_only = sequence(SamplingParams(temperature=0.7, top_k=2, logprobs=0), seed=4)
    first, second = sample(logits, [greedy, chosen_only])
    expected = torch.log_softmax(logits, dim=-1)
    assert first.logprob == pytest.approx(float(expected[0].max()))
    assert [token for token, _ in first.top] == expected[0].topk(3).indices.tolist()
    assert second.top == ()
    assert second.logprob == pytest.approx(float(expected[1, second.token_id]))
    assert sample(torch.empty(0, 1), []) == []
