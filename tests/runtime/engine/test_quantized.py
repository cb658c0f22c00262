"""The engine on a quantized checkpoint: the same text as on the same weights decoded."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mgvq_kernels.layout import VQLayout
from mgvq_kernels.ops import vq_dequantize
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec
from mgvq_runtime.checkpoint.writer import write_checkpoint
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from tests.runtime.engine.engine_runs import GREEDY, prompts, run, tokens
from tests.runtime.layers.random_weight import random_weight


@pytest.fixture(scope="module", params=["lookup", "trellis"])
def engines(
    request: pytest.FixtureRequest,
    loaded_tiny_model: Any,
    tiny_qwen2_vl_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Engine, Engine]:
    """An engine on a 2-bit checkpoint, and one on a dense model with the same weights decoded."""
    model, processor, resolved = loaded_tiny_model
    decoded = deepcopy(model)
    weights = {}
    for seed, (name, module) in enumerate(decoded.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            rate = 2 if "layers" in name else 4
            layout = VQLayout.uniform(
                *module.weight.shape,
                rate,
                has_permutation="mlp" in name,
                codec=request.param,
                window=12 if "down_proj" in name else 9,
            )
            weights[name] = random_weight(layout, seed)
            module.weight.copy_(vq_dequantize(weights[name]))
    for name, parameter in decoded.named_parameters():
        if name.removesuffix(".weight") not in weights:
            parameter.copy_(parameter.half())
    source = open_checkpoint(tiny_qwen2_vl_folder)
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    write_checkpoint(
        folder,
        source.config,
        QuantizationSpec({name: MatrixSpec(one.layout) for name, one in weights.items()}),
        [(n, t) for n, t in source.tensors() if n.removesuffix(".weight") not in weights],
        weights.items(),
        [tiny_qwen2_vl_folder / n for n in ("tokenizer.json", "preprocessor_config.json")],
    )
    quantized = Engine.from_checkpoint(folder, EngineConfig(device="cpu", max_model_len=512))
    return quantized, Engine(decoded, processor, resolved)


def test_greedy_tokens_are_those_of_the_decoded_weights(engines: tuple[Engine, Engine]) -> None:
    quantized, decoded = engines
    asked = prompts(decoded)
    found, expected = run(quantized, asked), run(decoded, asked)
    assert {k: tokens(v) for k, v in found.items()} == {k: tokens(v) for k, v in expected.items()}


def test_logprobs_alone_and_together_are_close(engines: tuple[Engine, Engine]) -> None:
    """One row goes through the lookup kernel, a batch through decoded matrices."""
    quantized, _ = engines
    asked = prompts(quantized)
    params = replace(GREEDY, logprobs=3, max_tokens=4)
    together = run(quantized, asked, params)
    for index, one in enumerate(asked):
        alone = run(quantized, [one], params)["0"]
        for a, b in zip(alone, together[str(index)], strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs is not None
            assert b.logprobs is not None
            for mine, theirs in zip(a.logprobs[0].top, b.logprobs[0].top, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_logprobs_are_those_of_the_decoded_weights(engines: tuple[Engine, Engine]) -> None:
    params = replace(GREEDY, logprobs=5, max_tokens=4)
    asked = prompts(engines[0])
    found, expected = (run(engine, asked, params) for engine in engines)
    for key, answers in expected.items():
        for ours, theirs in zip(found[key], answers, strict=True):
            assert ours.logprobs is not None
            assert theirs.logprobs is not None
            for mine, dense in zip(ours.logprobs[0].top, theirs.logprobs[0].top, strict=True):
                assert mine.logprob == pytest.approx(dense.logprob, abs=1e-3)


def test_quantized_weights_are_counted_packed(engines: tuple[Engine, Engine]) -> None:
    quantized, decoded = (engine.memory_summary() for engine in engines)
    assert quantized.weights_bytes < decoded.weights_bytes / 3
    assert quantized.decode_bytes < decoded.decode_bytes / 3
    assert quantized.kv_cache_bytes == decoded.kv_cache_bytes
