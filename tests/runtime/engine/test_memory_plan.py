"""The memory plan: its sums, what it refuses and how, and its estimates against real peaks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from mgvq_runtime import inspect
from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.config import EngineConfig, ModelFacts, kv_block_bytes
from mgvq_runtime.engine import memory_demand
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.memory import weights_bytes
from mgvq_runtime.engine.memory_demand import (
    available_bytes,
    encode_largest_pictures,
    estimated_demand,
    largest_grid,
    measured_demand,
    movable_table_bytes,
    read_longest_chunk,
)
from mgvq_runtime.engine.memory_plan import MIN_CUDA_HEADROOM_BYTES, MemoryDemand, plan_memory
from mgvq_runtime.engine.startup import start
from mgvq_runtime.errors import ConfigError
from mgvq_runtime.layers.embedding import HostEmbedding
from mgvq_runtime.models.loading import fill_model, model_config
from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor
from mgvq_runtime.multimodal.processors.llava_onevision import LlavaOnevisionImageProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from tests.runtime.conftest import write_hub_folder
from tests.runtime.engine.engine_runs import prompts, run, tokens

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
    demand = MemoryDemand(
        available, weights, vision, prefill, image_tokens, False, vision // 2, prefill // 2
    )
    demand = replace(demand, table_bytes=weights // 2)
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
    config = EngineConfig(device="cpu", max_batch_tokens=256, max_model_len=512)
    model, processor, _, _ = start(folder, config)
    images = processor.image_processor
    assert images is not None
    estimate = estimated_demand(config, model.config, images, 512, 4, 0, 0)
    vision = peak_bytes(lambda: encode_largest_pictures(model, images, config, 512))
    prefill = peak_bytes(lambda: read_longest_chunk(model, config, 512))
    text = model.config.text_config
    prefill -= 2 * 512 * text.num_key_value_heads * text.head_dim * 4  # the pool it made
    print(which, vision, estimate.vision_bytes, prefill, estimate.prefill_bytes)
    assert vision <= estimate.vision_bytes < 2.5 * vision
    assert prefill <= estimate.prefill_bytes < 2.5 * prefill
    # A picture of seven tiles, of which two go through the tower at once.
    tiles = SimpleNamespace(
        max_grid=(7, 16, 16), max_num_tokens=7 * 64, max_video_grid=lambda most: None
    )
    config = replace(config, max_batch_patches=2 * 256 + 1)
    estimate = estimated_demand(config, model.config, tiles, 512, 4, 0, 0)
    vision = peak_bytes(lambda: encode_largest_pictures(model, tiles, config, 512))
    assert vision <= estimate.vision_bytes < 2.5 * vision


@pytest.mark.parametrize("family", ["Qwen2-VL", "LLaVA-OneVision", "InternVL2"])
def test_the_largest_video_of_a_context_is_planned_for(family: str) -> None:
    """Against what the processors make of real frames: as many as the context holds."""
    frame = Image.new("RGB", (56, 56))
    images = {
        "Qwen2-VL": Qwen2VLImageProcessor(max_pixels=28 * 28 * 8),
        "LLaVA-OneVision": LlavaOnevisionImageProcessor(((70, 70),), tile_size=70),
        "InternVL2": InternVL2ImageProcessor(tile_size=56),
    }[family]
    for context in (40, 100):
        grid = images.max_video_grid(context)
        if grid is None:
            assert len(images.video([frame] * 3)) == 3, "each frame is a picture of its own"
            continue
        fitting = [images.video([frame] * n)[0] for n in range(1, 60)]
        most = max((v.num_patches for v in fitting if v.num_tokens <= context), default=0)
        assert most <= math.prod(grid) <= 1.6 * most, (context, grid, most)
        assert math.prod(largest_grid(images, True, 100)) >= most
        assert largest_grid(images, False, 100) == images.max_grid


def test_encoded_rows_graphs_and_the_table_are_lines_of_the_plan() -> None:
    config = EngineConfig(max_num_seqs=2, max_model_len=100)
    demand = replace(DEMAND, rows_bytes=3 << 20, graphs_bytes=5 << 20, table_bytes=GIB)
    plan = plan_memory(config, FACTS, "cuda:0", "float16", demand)
    plain = plan_memory(config, FACTS, "cuda:0", "float16", DEMAND)
    assert plan.planned_bytes - plain.planned_bytes == 8 << 20
    assert (plan.weights_bytes, plan.host_bytes) == (2 * GIB, 0)
    table = "\n".join(plan.lines())
    assert "pictures being read              3.0 MiB" in table
    assert "decode graphs                    5.0 MiB" in table
    moved = plan_memory(
        replace(config, embedding_device="host"), FACTS, "cuda:0", "float16", demand
    )
    assert (moved.weights_bytes, moved.host_bytes) == (GIB, GIB)
    assert plan.planned_bytes - moved.planned_bytes == GIB
    words = " ".join(" ".join(moved.lines()).split())
    assert "(token table 1,024.0 MiB in main memory)" in words


def test_the_table_moves_where_the_pool_would_be_cut_short_and_not_before() -> None:
    wide = replace(FACTS, num_hidden_layers=300)
    full = (8 * 256 + 1) * 100 * BLOCK
    taken = 3 * GIB + (128 << 20)  # weights, a forward, pictures
    for missing, host in [(0, 0), (1, GIB)]:
        available = taken + full + MIN_CUDA_HEADROOM_BYTES - missing
        available = max(available, (taken + full) * 20 // 19 + 1 - missing)
        demand = replace(DEMAND, available_bytes=available, table_bytes=GIB)
        plan = plan_memory(EngineConfig(), wide, "cuda:0", "float16", demand)
        assert (plan.host_bytes, plan.kv_cache_bytes) == (host, full)
        stays = EngineConfig(embedding_device="device")
        plan = plan_memory(stays, wide, "cuda:0", "float16", demand)
        assert (plan.host_bytes, plan.kv_cache_bytes < full) == (0, bool(missing))
    demand = replace(DEMAND, available_bytes=3 * GIB, table_bytes=GIB, graphs_bytes=77)
    with pytest.raises(ConfigError, match="--embedding-device host") as caught:
        plan_memory(EngineConfig(embedding_device="device"), FACTS, "cuda:0", "float16", demand)
    assert "77 bytes of decode graphs with --enforce-eager" in str(caught.value)


def test_a_table_that_cannot_move_stays_and_says_why(
    tiny_qwen2_vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_qwen2_vl_folder)
    shapes = model_config(checkpoint)
    untied = replace(shapes, tie_word_embeddings=False)
    quantized = open_checkpoint(demo_checkpoint_path())
    integrated = SimpleNamespace(is_integrated=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: integrated)
    cases = [
        (checkpoint, untied, "cpu", "in main memory anyway"),
        (checkpoint, untied, "cuda:0", "shares main memory"),
        (checkpoint, replace(shapes, tie_word_embeddings=True), "cuda:1", "output head"),
        (quantized, replace(model_config(quantized), tie_word_embeddings=False), "cuda:1", "quant"),
    ]
    for which, config, name, reason in cases:
        device = torch.device(name)
        assert movable_table_bytes(EngineConfig(), which, config, device, 2) == 0
        on_host = EngineConfig(embedding_device="host")
        with pytest.raises(ConfigError, match=reason):
            movable_table_bytes(on_host, which, config, device, 2)
    text = shapes.text_config
    found = movable_table_bytes(EngineConfig(), checkpoint, untied, torch.device("cuda:1"), 2)
    assert found == text.vocab_size * text.hidden_size * 2


def test_an_integrated_gpu_has_no_more_than_main_memory_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Jetson's driver counts the page cache as used; neither number alone may be trusted."""
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(memory_demand, "_available_main_memory", lambda: 5 * GIB)
    for integrated, free, expected in [(True, 6, 5), (True, 4, 4), (False, 6, 6)]:
        properties = SimpleNamespace(is_integrated=integrated)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, p=properties: p)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d, f=free: (f * GIB, 8 * GIB))
        assert available_bytes(device) == expected * GIB


def test_what_a_gpu_measures_is_told_apart(
    loaded_tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's readings are played; the worst cases behind them run on the CPU."""
    model, processor, _ = loaded_tiny_model
    runs, free = [], iter([4 * GIB - 70, 4 * GIB, 4 * GIB])

    def peak(device: torch.device, work: Callable[[], None]) -> int:
        work()
        runs.append(work)
        return 1000 * len(runs)

    monkeypatch.setattr(memory_demand, "_peak_bytes", peak)
    monkeypatch.setattr(memory_demand, "available_bytes", lambda device: next(free))
    monkeypatch.setattr(memory_demand, "CudaRecorder", lambda device: lambda work: work() or work)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    config = EngineConfig(max_batch_tokens=32)
    images, shapes = processor.image_processor.capped(16), model.config
    demand = measured_demand(model, images, config, 64, 6 * GIB, (1, 2), host_bytes=5)
    assert (demand.vision_bytes, demand.prefill_bytes, demand.graphs_bytes) == (1000, 2000, 70)
    assert demand.weights_bytes == 2 * GIB + 5
    assert demand.max_image_tokens == images.max_num_tokens
    most = max(images.max_num_tokens, 64)  # a video may fill the context
    assert demand.rows_bytes == 2 * (most + 32) * shapes.text_config.hidden_size * 4
    estimate = estimated_demand(config, shapes, images, 64, 4, 6 * GIB, 7, (1, 2))
    assert estimate.rows_bytes == demand.rows_bytes
    assert estimate.graphs_bytes > 0


def test_a_table_in_main_memory_gives_the_same_answers(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, seed=1, tie_word_embeddings=False)
    beside, processor, resolved, _ = start(tmp_path, EngineConfig(device="cpu", max_model_len=256))
    apart = fill_model(open_checkpoint(tmp_path), table_on_host=True)
    assert isinstance(apart.model.embed_tokens, HostEmbedding)
    engines = [Engine(model, processor, resolved) for model in (beside, apart)]
    expected, found = (run(engine, prompts(engine)[:4]) for engine in engines)
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}
    total = engines[0].memory_summary().weights_bytes
    assert weights_bytes(apart) == weights_bytes(apart, device_type="cpu") == total
    assert weights_bytes(apart, device_type="cuda") == 0


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
