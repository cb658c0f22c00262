"""From a folder to an engine: settings, the bundled model, the worst case, a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgvq_runtime import assets
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.memory_demand import (
    encode_largest_pictures,
    read_longest_chunk,
    worst_patches,
)
from mgvq_runtime.engine.startup import start
from mgvq_runtime.errors import CheckpointError, ConfigError
from tests.runtime.conftest import write_hub_folder
from tests.runtime.engine.engine_runs import prompts, run, tokens


def test_settings_reach_the_engine(tiny_qwen2_vl_folder: Path) -> None:
    config = EngineConfig(
        checkpoint=str(tiny_qwen2_vl_folder),
        device="cpu",
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=3,
        max_image_tokens=6,
        num_threads=1,
    )
    engine = Engine.from_checkpoint(config=config)
    assert (engine.config.device, engine.config.dtype) == ("cpu", "bfloat16")
    assert (engine.max_model_len, engine.config.max_num_seqs) == (64, 3)
    assert {p.dtype for p in engine._runner.model.parameters()} == {torch.bfloat16}
    large = prompts(engine)[2].images[0]
    assert large.num_tokens <= 6
    found = run(engine, prompts(engine)[:2])
    assert [len(tokens(outputs)) for outputs in found.values()] == [12, 12]


def test_without_a_checkpoint_the_bundled_one_is_taken(
    tiny_qwen2_vl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="--checkpoint"):
        Engine.from_checkpoint()
    (tmp_path / "demo").symlink_to(tiny_qwen2_vl_folder, target_is_directory=True)
    engine = Engine.from_checkpoint(config=EngineConfig(device="cpu", max_model_len=64))
    assert engine.model_config.text_config.hidden_size == 64


def test_a_gpu_that_is_not_there_is_named(
    tiny_qwen2_vl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        start(tiny_qwen2_vl_folder, EngineConfig(device="cuda"))


def test_the_worst_case_runs_as_large_as_it_says(
    loaded_tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded_tiny_model[0]
    seen: list[int] = []
    encode, forward = model.encode_images, type(model).forward
    monkeypatch.setattr(
        model,
        "encode_images",
        lambda p, g, max_patches: (
            seen.extend((len(p), max_patches)) or encode(p, g, (), max_patches)
        ),
    )
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, x, b: seen.extend((len(x), *b.context_lens)) or forward(self, x, b),
    )
    images = loaded_tiny_model[1].image_processor.capped(12)
    largest = 4 * images.max_num_tokens
    assert largest >= 4 * 12
    for budget, expected in [(1, largest), (2 * largest + 1, 2 * largest)]:
        config = EngineConfig(max_batch_patches=budget)
        encode_largest_pictures(model, images, config, 48)
        assert seen == [expected, expected]
        assert worst_patches(config, images.max_grid) == expected
        del seen[:]
    tiled = SimpleNamespace(max_grid=(7, 4, 4), max_video_grid=lambda most: None)
    for budget, num_patches, at_once in [(1, 112, 16), (40, 112, 32), (170, 160, 160)]:
        encode_largest_pictures(model, tiled, EngineConfig(max_batch_patches=budget), 48)
        assert seen == [num_patches, at_once]
        del seen[:]
    read_longest_chunk(model, EngineConfig(max_batch_tokens=33), 100)
    read_longest_chunk(model, EngineConfig(max_batch_tokens=33), 20)
    assert seen == [33, 100, 20, 20]


@pytest.mark.gpu
def test_a_gpu_gives_the_text_of_the_cpu(tiny_qwen2_vl_folder: Path) -> None:
    config = EngineConfig(device="cuda", dtype="float32", max_model_len=512)
    on_gpu = Engine.from_checkpoint(tiny_qwen2_vl_folder, config)
    on_cpu = Engine.from_checkpoint(tiny_qwen2_vl_folder, EngineConfig(device="cpu"))
    found, expected = run(on_gpu, prompts(on_gpu)), run(on_cpu, prompts(on_cpu))
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}
    peak = on_gpu.memory_summary().peak_device_bytes
    assert peak is not None
    assert peak > 0


@pytest.mark.gpu
def test_a_table_in_main_memory_feeds_a_gpu(tmp_path: Path) -> None:
    write_hub_folder(tmp_path, seed=1, tie_word_embeddings=False)
    answers, plans = [], []
    for place in ("device", "host"):
        config = EngineConfig(
            device="cuda", dtype="float16", max_model_len=512, embedding_device=place
        )
        engine = Engine.from_checkpoint(tmp_path, config)
        answers.append({k: tokens(v) for k, v in run(engine, prompts(engine)).items()})
        plans.append(engine.memory_plan)
        weight = engine._runner.model.model.embed_tokens.weight
        assert (weight.is_cuda, weight.is_pinned()) == (place == "device", place == "host")
    assert answers[0] == answers[1]
    beside, apart = plans
    assert beside is not None
    assert apart is not None
    assert (beside.host_bytes, apart.host_bytes) == (0, weight.numel() * 2)
    assert apart.graphs_bytes > 0
