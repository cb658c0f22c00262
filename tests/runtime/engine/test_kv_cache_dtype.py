"""Keys and values in int8: what is planned is allocated, and the bundled model answers the same."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.cache.block_key import root_digest
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.memory_demand import read_longest_chunk
from mgvq_runtime.engine.startup import open_for_planning, start
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.request import Prompt, SamplingParams
from tests.runtime.engine.engine_runs import run, tokens

NUM_QUESTIONS = 24
INT8 = EngineConfig(device="cpu", max_model_len=512, kv_cache_dtype="int8")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return start(None, INT8)


@pytest.fixture(scope="module")
def asked(loaded: Any) -> list[Prompt]:
    with zipfile.ZipFile(demo_checkpoint_path() / "questions.zip") as archive:
        rows = [json.loads(line) for line in archive.read("questions.jsonl").splitlines()]
        chosen = rows[:: len(rows) // NUM_QUESTIONS][:NUM_QUESTIONS]
        prompts = []
        for row in chosen:
            pictures = [Image.open(io.BytesIO(archive.read(name))) for name in row["images"]]
            parts: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
            parts.append({"type": "text", "text": row["question"]})
            message = {"role": "user", "content": parts}
            prompts.append(loaded.chat_processor.prepare([message], pictures))
    return prompts


def engine(loaded: Any, **changes: Any) -> Engine:
    return Engine(loaded.model, loaded.chat_processor, replace(loaded.config, **changes))


def test_the_pool_is_as_large_as_planned(loaded: Any) -> None:
    made = engine(loaded)
    assert loaded.config.kv_cache_dtype == loaded.plan.kv_cache_dtype == "int8"
    assert made.memory_summary().kv_cache_bytes == loaded.plan.kv_cache_bytes
    layer = made._runner.kv_cache.layers[-1]
    assert layer.keys.dtype == layer.values.dtype == torch.int8
    assert layer.key_scales is not None
    assert layer.key_scales.shape == layer.keys.shape[:3]
    config = replace(INT8, kv_cache_dtype="auto")
    wide = open_for_planning(None, config, "cpu").plan(config, loaded.plan.available_bytes)
    assert wide.num_kv_blocks == loaded.plan.num_kv_blocks
    assert loaded.plan.kv_block_bytes * 4 * 64 == wide.kv_block_bytes * 66
    read_longest_chunk(loaded.model, INT8, 100)


def test_greedy_answers_are_those_of_float32(loaded: Any, asked: list[Prompt]) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    found = run(engine(loaded), asked, greedy)
    expected = run(engine(loaded, kv_cache_dtype="float32"), asked, greedy)
    same = sum(tokens(found[key]) == tokens(expected[key]) for key in expected)
    assert same >= NUM_QUESTIONS - 2, "measured: 95 of 96"


def test_a_block_is_never_one_of_another_type(loaded: Any) -> None:
    """What a block is found by begins with a digest of everything its numbers depend on."""
    facts = [engine(loaded, kv_cache_dtype=one)._cache_facts for one in ("int8", "float32")]
    assert root_digest(facts[0], None) != root_digest(facts[1], None)


def test_lengths_on_the_device_give_what_lengths_on_the_host_give(loaded: Any) -> None:
    """A batch of single tokens may bring its lengths as a tensor, for a captured graph."""
    layers = engine(loaded)._runner.kv_cache.layers
    torch.manual_seed(0)
    for layer in layers:
        for codes, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales)):
            codes[:5] = torch.randint(-127, 128, codes[:5].shape).to(torch.int8)
            scales[:5] = 0.01
    host = ForwardBatch(
        positions=torch.tensor([[20, 7]] * 3),
        cu_seqlens_q=(0, 1, 2),
        context_lens=(21, 8),
        block_table=torch.tensor([[1, 2], [3, 0]], dtype=torch.int32),
        slot_mapping=torch.tensor([2 * 16 + 4, 3 * 16 + 7]),
        kv_cache=layers,
    )
    lengths = torch.tensor([21, 8], dtype=torch.int32)
    device = replace(host, context_lens=None, context_lens_tensor=lengths)
    embeds = torch.randn(2, loaded.model.config.text_config.hidden_size)
    with torch.inference_mode():
        expected = loaded.model(embeds, host)
        assert torch.equal(loaded.model(embeds, device), expected)
