"""The memory plan: its sums, what it refuses and how, and its estimates against real peaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from mgvq_runtime import inspect
from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.config import EngineConfig, ModelFacts, kv_block_bytes
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.memory_demand import (
    encode_largest_pictures,
    estimated_demand,
    read_longest_chunk,
)
from mgvq_runtime.engine.memory_plan import MIN_CUDA_HEADROOM_BYTES, MemoryDemand, plan_memory
from mgvq_runtime.engine.startup import start
from mgvq_runtime.errors import ConfigError

FACTS = ModelFacts(
    max_position_embeddings=4096,
    is_quantized=True,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=8,
)
BLOCK = 2 * 3 * 2 * 8 * 2 * 16
"""Bytes of 16 tokens: keys and values, layers, heads, numbers a head, two bytes each."""
GIB = 1 << 30
DEMAND = MemoryDemand(8 * GIB, 2 * GIB, GIB, GIB // 2, 1280, is_measured=True)


def test_the_pool_gets_what_is_left() -> None:
    assert kv_block_bytes(FACTS, 16, "float16") == BLOCK
    config = EngineConfig(max_num_seqs=512, image_cache_bytes=GIB // 4)
    wide = replace(FACTS, num_hidden_layers=300)
    plan = plan_memory(config, wide, "cuda:0", "float16", DEMAND)
    headroom = 8 * GIB // 20
    left = 8 * GIB - 2 * GIB - GIB - GIB // 4 - headroom
    assert plan.num_kv_blocks == left // (100 * BLOCK)
    assert plan.planned_bytes + headroom <= 8 * GIB < plan.planned_bytes + headroom + 100 * BLOCK
    assert plan.max_model_len == 4096


def test_an_int8_pool_holds_more_tokens_in_the_same_bytes() -> None:
    assert kv_block_bytes(FACTS, 16, "int8") == BLOCK // 2 + 2 * 3 * 2 * 2 * 16  # codes, scales
    config = EngineConfig(kv_cache_bytes=100 * BLOCK, kv_cache_dtype="int8")
    plan = plan_memory(config, FACTS, "cuda:0", "float16", DEMAND)
    assert plan.num_kv_blocks == 100 * BLOCK // kv_block_bytes(FACTS, 16, "int8") > 150
    assert any("int8" in line for line in plan.lines())


def test_the_pool_takes_no_more_than_is_of_use_and_no_more_than_is_allowed() -> None:
    config = EngineConfig(max_num_seqs=2, max_model_len=100)
    assert plan_memory(config, FACTS, "cuda:0", "float16", DEMAND).num_kv_blocks == 2 * 7 + 1
    config = EngineConfig(kv_cache_bytes=100 * BLOCK + 5)
    assert plan_memory(config, FACTS, "cuda:0", "float16", DEMAND).num_kv_blocks == 100
    huge = replace(FACTS, num_hidden_layers=3000)
    on_cpu = plan_memory(EngineConfig(), huge, "cpu", "float32", DEMAND)
    assert GIB - 2000 * BLOCK < on_cpu.kv_cache_bytes <= GIB
    assert on_cpu.image_cache_bytes == 2 * EngineConfig().image_cache_bytes


def test_a_limit_makes_a_large_device_small_and_never_a_small_one_large() -> None:
    for limit in (4 * GIB, 64 * GIB):
        config = EngineConfig(gpu_memory_limit=limit)
        plan = plan_memory(config, FACTS, "cuda:0", "float16", DEMAND)
        assert plan.available_bytes == min(limit, 8 * GIB)
    small = replace(DEMAND, available_bytes=4 * GIB)
    limited = plan_memory(
        EngineConfig(gpu_memory_limit=4 * GIB), FACTS, "cuda:0", "float16", DEMAND
    )
    assert limited == plan_memory(EngineConfig(), FACTS, "cuda:0", "float16", small)
    assert plan_memory(EngineConfig(), FACTS, "cuda:0", "float16", small).headroom_bytes == (
        MIN_CUDA_HEADROOM_BYTES
    )


@pytest.mark.parametrize(
    ("settings_", "demand", "flags"),
    [
        ({}, {"available_bytes": 3 * GIB}, ["--max-image-tokens", "--max-batch-patches"]),
        ({"gpu_memory_limit": 3 * GIB}, {}, ["raise --gpu-memory-limit", "--image-cache-bytes"]),
        (
            {"max_model_len": 4000},
            {"vision_bytes": 0, "prefill_bytes": 6 * GIB, "max_image_tokens": 0},
            ["--max-model-len (now 4000)", "--max-batch-tokens (now 1024)", "larger device"],
        ),
        ({"kv_cache_bytes": 20 * BLOCK}, {}, ["raise --kv-cache-bytes"]),
    ],
)
def test_too_little_memory_is_refused_with_the_flags_that_help(
    settings_: dict[str, int], demand: dict[str, int], flags: list[str]
) -> None:
    with pytest.raises(ConfigError, match="too little memory: one request of") as caught:
        plan_memory(
            EngineConfig(**settings_), FACTS, "cuda:0", "float16", replace(DEMAND, **demand)
        )
    for flag in flags:
        assert flag in str(caught.value)
    assert "weights  " in str(caught.value), "the table says where the bytes are"
    if "kv_cache_bytes" in settings_:
        assert "--max-batch" not in str(caught.value), "it would not help"


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 1 << 34),
    st.integers(0, 1 << 33),
    st.integers(0, 1 << 31),
    st.integers(0, 1 << 31),
    st.integers(0, 3000),
    st.sampled_from(["cpu", "cuda:0"]),
    st.sampled_from([None, 2, 77, 4096]),
    st.sampled_from([None, 1 << 20, 1 << 30]),
)
def test_a_plan_fits_or_is_refused(
    available: int,
    weights: int,
    vision: int,
    prefill: int,
    image_tokens: int,
    device: str,
    max_model_len: int | None,
    kv_cache_bytes: int | None,
) -> None:
    demand = MemoryDemand(available, weights, vision, prefill, image_tokens, False)
    config = EngineConfig(max_model_len=max_model_len, kv_cache_bytes=kv_cache_bytes)
    try:
        plan = plan_memory(config, FACTS, device, "float16", demand)
    except ConfigError:
        return
    assert plan.planned_bytes + plan.headroom_bytes <= available
    assert plan.max_model_len <= (plan.num_kv_blocks - 1) * plan.block_size
    assert max_model_len in (None, plan.max_model_len), "what was asked for is given or refused"
    assert kv_cache_bytes is None or plan.kv_cache_bytes <= kv_cache_bytes


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of torch's CPU allocator alive at once during a run, by its own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_estimates_are_above_the_real_peak_and_not_far(
    which: str, tiny_qwen2_vl_folder: Path
) -> None:
    folder = tiny_qwen2_vl_folder if which == "tiny" else demo_checkpoint_path()
    config = EngineConfig(device="cpu", max_batch_tokens=256, max_model_len=1024)
    model, processor, _, _ = start(folder, config)
    images = processor.image_processor
    assert images is not None
    estimate = estimated_demand(config, model.config, images, 1024, 4, 0, 0)
    vision = peak_bytes(lambda: encode_largest_pictures(model, images, config))
    prefill = peak_bytes(lambda: read_longest_chunk(model, config, 1024))
    text = model.config.text_config
    prefill -= 2 * 1024 * text.num_key_value_heads * text.head_dim * 4  # the pool it made
    print(which, vision, estimate.vision_bytes, prefill, estimate.prefill_bytes)
    assert vision <= estimate.vision_bytes < 2.5 * vision
    assert prefill <= estimate.prefill_bytes < 2.5 * prefill
    # A picture of seven tiles, of which two go through the tower at once.
    tiles = SimpleNamespace(max_grid=(7, 16, 16), max_num_tokens=7 * 64)
    config = replace(config, max_batch_patches=2 * 256 + 1)
    estimate = estimated_demand(config, model.config, tiles, 1024, 4, 0, 0)
    vision = peak_bytes(lambda: encode_largest_pictures(model, tiles, config))
    assert vision <= estimate.vision_bytes < 2.5 * vision


def test_a_started_engine_has_its_plan_and_small_memory_is_refused_before_loading(
    tiny_qwen2_vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(device="cpu", max_model_len=64, max_image_tokens=16)
    engine = Engine.from_checkpoint(tiny_qwen2_vl_folder, config)
    plan = engine.memory_plan
    assert plan is not None
    memory = engine.memory_summary()
    assert plan.weights_bytes == memory.weights_bytes
    assert plan.kv_cache_bytes == memory.kv_cache_bytes
    assert engine.max_model_len == plan.max_model_len == 64
    monkeypatch.setattr("mgvq_runtime.engine.startup.fill_model", None)
    with pytest.raises(ConfigError, match="raise --gpu-memory-limit"):
        Engine.from_checkpoint(tiny_qwen2_vl_folder, replace(config, gpu_memory_limit=200_000))


def test_inspect_prints_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder = str(demo_checkpoint_path())

    def run(*arguments: Any) -> tuple[int, str]:
        code = inspect.main([folder, "--plan", *arguments])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    code, shown = run("--json", "--max-model-len", "512", "--device", "cpu")
    assert code == 0
    plan = json.loads(shown.splitlines()[-1])
    assert (plan["device"], plan["max_model_len"], plan["is_measured"]) == ("cpu", 512, False)
    assert f"{plan['kv_cache_bytes'] / 2**20:,.1f} MiB" in shown
    code, shown = run("--json", "--device", "cuda", "--gpu-memory-limit", "1GiB")
    plan = json.loads(shown.splitlines()[-1])
    assert (code, plan["available_bytes"], plan["headroom_bytes"]) == (0, GIB, GIB // 4)
    code, shown = run("--device", "cuda")
    assert code == 2
    assert "say how much memory it has with --gpu-memory-limit" in shown
    code, shown = run("--device", "cuda", "--gpu-memory-limit", "300MiB")
    assert code == 2
    assert "raise --gpu-memory-limit" in shown
