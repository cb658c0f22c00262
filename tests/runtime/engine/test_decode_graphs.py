"""Replayed decode steps against eager ones, on a CPU by a recorder that does the work again.

Such a recorder hands over nothing but the buffers, so it sees what a CUDA graph would: padding,
batches between two sizes, buffers used again, lengths that only the device knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mgvq_kernels import ops
from mgvq_runtime.cache.block_manager import DUMMY_BLOCK
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.decode_graphs import DecodeGraphs, decode_batch_sizes
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.startup import start
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models import activations
from mgvq_runtime.models.activations import decode_graph_bytes
from mgvq_runtime.request import FinishReason, Request, RequestOutput
from tests.runtime.engine.engine_runs import GREEDY, finish, prompts, run, tokens

MakeEngine = Callable[..., Engine]
PARAMS = [replace(GREEDY, max_tokens=6 + 3 * index, logprobs=3) for index in range(8)]
"""Answers of unequal lengths, so that the batch shrinks through every size."""


class Rerun:
    """A recorder that does the work again, and notes which of its recordings was asked to."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed: list[int] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        number = self.recorded
        self.recorded += 1

        def replay() -> None:
            self.replayed.append(number)
            work()

        return replay


def with_graphs(engine: Engine, sizes: tuple[int, ...]) -> Rerun:
    recorder, runner = Rerun(), engine._runner
    runner.decode_graphs = DecodeGraphs(
        runner.model, runner.kv_cache.layers, sizes, engine.config.max_model_len, recorder
    )
    return recorder


def numbers(outputs: dict[str, list[RequestOutput]]) -> torch.Tensor:
    """Log-probabilities of all tokens of all requests."""
    entries = [o.logprobs for key in sorted(outputs) for o in outputs[key]]
    return torch.tensor([one.logprob for each in entries for one in each or ()])


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (3, 8), (8,)], ids=str)
@pytest.mark.parametrize("block_size", [16, 5])
def test_replayed_steps_give_what_eager_ones_give(
    make_engine: MakeEngine, sizes: tuple[int, ...], block_size: int
) -> None:
    eager, replayed = make_engine(block_size=block_size), make_engine(block_size=block_size)
    recorder = with_graphs(replayed, sizes)
    expected, found = run(eager, prompts(eager), PARAMS), run(replayed, prompts(replayed), PARAMS)
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}
    torch.testing.assert_close(numbers(found), numbers(expected), atol=2e-5, rtol=0)
    assert set(recorder.replayed) == set(range(len(sizes))), "every size was of use"


def test_a_step_of_one_token_prompts_and_pictures_is_replayed_too(make_engine: MakeEngine) -> None:
    """Budgets of one token: each token of a prompt, also inside a picture, is such a step."""
    eager = make_engine(max_num_seqs=1)
    replayed = make_engine(max_num_seqs=1, max_batch_tokens=1)
    recorder = with_graphs(replayed, (1,))
    asked = prompts(eager)[:2]
    expected, found = run(eager, asked), run(replayed, asked)
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}
    last = [outputs[-1] for outputs in found.values()]
    num_run = [o.num_prompt_tokens - o.num_cached_tokens + GREEDY.max_tokens - 1 for o in last]
    assert len(recorder.replayed) == sum(num_run)


def test_logits_of_one_step_outlive_the_next(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    with_graphs(engine, (1,))
    engine.add(Request("r", prompts(engine)[1], GREEDY))
    kept, run_step = [], engine._runner.run

    def keep(chunks: list[Any]) -> torch.Tensor:
        kept.append(run_step(chunks))
        return kept[-1]

    monkeypatch.setattr(engine._runner, "run", keep)
    assert tokens(finish(engine)["r"]) == [int(logits.argmax()) for logits in kept]


def test_padding_writes_to_the_dummy_block_alone(make_engine: MakeEngine) -> None:
    """Also when its rows were requests a step before, whose blocks may be another's by now."""
    engine = make_engine()
    with_graphs(engine, (8,))
    for index, one in enumerate(prompts(engine)):
        engine.add(Request(str(index), one, GREEDY))
    while not all(s.is_decoding for s in engine._sequences.values()):
        engine.step()
    engine.step()
    for index in range(5):
        engine.abort(str(index))
    left = list(engine._sequences.values())
    held = {block for sequence in left for block in sequence.block_table}
    caches = [cache for layer in engine._runner.kv_cache.layers for cache in layer[:2]]
    for cache in caches:
        cache[[block for block in range(len(cache)) if block not in held]] = 7.0
    before = [cache.clone() for cache in caches]
    places = {(s.block_table[-1], (len(s.token_ids) - 1) % 16) for s in left}
    engine.step()
    for old, new in zip(before, caches, strict=True):
        changed = (old != new).flatten(2).any(-1).nonzero().tolist()
        assert {tuple(place) for place in changed if place[0] != DUMMY_BLOCK} == places


def test_a_row_that_is_not_finite_harms_no_other_and_no_later_step(make_engine: MakeEngine) -> None:
    """One request of a replayed batch gets NaN logits: it alone ends, with an error."""
    engine = make_engine()
    with_graphs(engine, (4, 8))
    asked = prompts(engine)[:5]
    expected = run(engine, asked)
    for index, one in enumerate(asked):
        engine.add(Request(str(index), one, GREEDY))
    while not all(s.is_decoding for s in engine._sequences.values()):
        engine.step()
    victim = engine._sequences["2"].block_table[-1]  # not shared
    for keys, values, *_ in engine._runner.kv_cache.layers:
        keys[victim], values[victim] = float("nan"), float("nan")
    found = finish(engine)
    assert found["2"][-1].finish_reason is FinishReason.ERROR
    assert "not finite" in (found["2"][-1].error or "")
    for key in "0134":
        assert tokens(found[key]) == tokens(expected[key])[-len(tokens(found[key])) :]
        assert found[key][-1].finish_reason is FinishReason.LENGTH
    assert {k: tokens(v) for k, v in run(engine, asked).items()} == {
        k: tokens(v) for k, v in expected.items()
    }


def test_what_is_recorded_reads_no_tensor_on_the_host(
    loaded_tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step on the meta device, where nothing has a value: what asks for one fails."""
    model, _, resolved = loaded_tiny_model
    text = model.config.text_config
    with torch.device("meta"):
        ghost = type(model)(model.config).to("meta", torch.float16)
        shape = (4, 16, text.num_key_value_heads, text.head_dim)
        cache = [(torch.empty(shape, dtype=torch.float16),) * 2] * text.num_hidden_layers
    seen = []

    def attend(q: Any, keys: Any, values: Any, table: Any, lengths: Any, scale: float) -> Any:
        seen.append((table.shape, lengths.shape, lengths.dtype))
        return torch.empty_like(q)

    monkeypatch.setattr(ops, "paged_attention_decode", attend)
    graphs = DecodeGraphs(ghost, cache, (1, 2), resolved.max_model_len, Rerun())
    width = -(-resolved.max_model_len // 16)
    layers = text.num_hidden_layers
    assert seen == [((n, width), (n,), torch.int32) for n in (2, 1) for _ in range(layers)]
    assert graphs.num_bytes == 2 * (
        2 * text.hidden_size + 8 * 4 + 4 * width + 4 + 4 * text.vocab_size
    )
    planned = decode_graph_bytes(text, 2, 16, resolved.max_model_len, 2)
    assert graphs.num_bytes < planned < 4 * graphs.num_bytes


def test_the_plan_splits_contexts_as_the_kernel_does() -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is no kernel")
    from mgvq_kernels.triton import paged_attention

    assert activations.SPLIT_TOKENS == paged_attention.SPLIT_TOKENS


def test_sizes_are_powers_of_two_and_the_most_and_none_where_nothing_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    assert decode_batch_sizes("cuda:0", "float16", 1) == (1,)
    assert decode_batch_sizes("cuda:0", "bfloat16", 8) == (1, 2, 4, 8)
    assert decode_batch_sizes("cuda:0", "float16", 12) == (1, 2, 4, 8, 12)
    assert decode_batch_sizes("cuda:0", "float32", 8) == ()
    assert decode_batch_sizes("cpu", "bfloat16", 8) == ()
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert decode_batch_sizes("cuda:0", "float16", 8) == ()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cuda_graphs_give_what_eager_steps_give(tiny_qwen2_vl_folder: Any, dtype: str) -> None:
    """Logits of replayed graphs against the same kernels launched one by one."""
    config = EngineConfig(device="cuda", dtype=dtype, max_model_len=512)
    model, processor, resolved, _ = start(tiny_qwen2_vl_folder, config)
    assert resolved.decode_batch_sizes == (1, 2, 4, 8)
    engine = Engine(model, processor, resolved)
    graphs = engine._runner.decode_graphs
    assert graphs is not None
    seen = []
    replay = graphs.run

    def both(embeds: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        found = replay(embeds, batch)
        lengths = torch.tensor(batch.context_lens, dtype=torch.int32, device=embeds.device)
        hidden = model(embeds, replace(batch, context_lens_tensor=lengths))
        seen.append((found, model.logits(hidden)))
        return found

    graphs.run = both  # type: ignore[method-assign]
    run(engine, prompts(engine), PARAMS)
    assert {len(found) for found, _ in seen} >= {1, 2, 3, 5, 8}
    for found, expected in seen:
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)
