"""Tuning lowers the divergence it measures, keeps codes, and returns what can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgvq_quantizer import calibration, pipeline
from mgvq_quantizer.allocation import plan
from mgvq_quantizer.batches import (
    Features,
    TokenBatch,
    deal,
    embed,
    encode_pictures,
    make_batch,
    unique_pictures,
)
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.teacher import Reference, ask_teacher, divergence
from mgvq_quantizer.tuning import tune
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.tokenizer import Tokenizer
from tests.quantizer.conftest import QUICK


def test_divergence_is_that_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    one, two = (torch.randn(5, 30, generator=g).log_softmax(-1) for _ in range(2))
    kl = torch.nn.functional.kl_div(two, one, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergence(one, two), kl, atol=1e-6)
    assert torch.equal(divergence(one, one), torch.zeros(5))


def test_tuning_lowers_the_divergence_and_touches_no_code(
    dense: Path, quantized: tuple[Path, Report]
) -> None:
    tokenizer, graph = Tokenizer.from_folder(dense), load_model(dense)
    images = Qwen2VLImageProcessor.from_folder(dense, None)
    _, conversations = calibration.load_conversations(None, dense)
    processor = ChatProcessor(tokenizer, images, graph.config)
    samples = calibration.prepare(conversations, processor, tokenizer)
    features = encode_pictures(graph, unique_pictures(samples), "cpu")
    hidden = {}
    for sample in samples:
        batch = make_batch([sample], "cpu")
        states = graph(embed(graph, batch, features), batch.forward)
        hidden[id(sample)] = states[batch.answer_rows]
    reference = Reference(hidden, graph.model.embed_tokens.weight.clone())
    weights = dict(open_checkpoint(quantized[0]).vq_weights())
    recipe = QuantRecipe()
    said: list[str] = []
    plans = plan(graph, recipe)
    parts = (deal(samples[:-1], 20, 256, 0), samples[-1:])
    tuned = tune(graph, plans, weights, reference, parts, features, recipe, said.append)
    assert tuned.kl_after < 0.9 * tuned.kl_before
    assert tuned.steps > 0
    assert said
    assert set(tuned.weights) == {name for name in plans if not name.startswith("visual.")}
    for name, weight in tuned.weights.items():
        assert torch.equal(weight.codes[0][0], weights[name].codes[0][0])
    assert any(
        not torch.equal(weight.codebooks[0][0], weights[name].codebooks[0][0])
        for name, weight in tuned.weights.items()
    )
    still = ([], parts[1])
    untouched = tune(graph, plans, weights, reference, still, features, recipe, said.append)
    assert untouched.kl_after == untouched.kl_before
    for name, weight in untouched.weights.items():
        assert torch.equal(weight.codebooks[0][0], weights[name].codebooks[0][0])
        assert torch.equal(weight.scales, weights[name].scales)


def test_every_sample_is_dealt_before_one_comes_again() -> None:
    samples: list[Any] = [SimpleNamespace(token_ids=range(10)) for _ in range(7)]
    batches = deal(samples, 6, 25, 3)
    assert [len(batch) for batch in batches] == [1, 2, 2, 2, 1, 2]
    first = [id(sample) for batch in batches[:4] for sample in batch]
    assert sorted(first) == sorted(map(id, samples))
    assert [id(sample) for batch in batches[4:] for sample in batch] != first[:3]
    again, other = deal(samples, 6, 25, 3), deal(samples, 6, 25, 4)
    ids = [[id(sample) for batch in dealt for sample in batch] for dealt in (batches, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_the_dense_model_is_asked_only_what_is_used(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what only tuning uses changes nothing that comes before it."""
    asked: list[Sample] = []

    def note(
        graph: CausalLM,
        batches: Sequence[TokenBatch],
        features: Features,
        heard: Reference | None = None,
    ) -> Reference:
        asked.extend(sample for batch in batches for sample in batch.samples)
        return ask_teacher(graph, batches, features, heard)

    monkeypatch.setattr(pipeline, "ask_teacher", note)
    base = QuantRecipe(**{**QUICK, "picture_swaps": 8, "tuning_batch_tokens": 1})
    counts, errors = [], []
    for steps in (0, 2, 200):
        asked.clear()
        recipe = replace(base, tuning_steps=steps)
        report = quantize(dense, tmp_path / str(steps), recipe, show_progress=False)
        assert len({id(sample) for sample in asked}) == len(asked)
        counts.append(len(asked))
        errors.append({name: matrix.error for name, matrix in report.matrices.items()})
    conversations = counts[0]
    assert conversations <= counts[1] <= conversations + 2
    assert counts[2] > 5 * conversations
    assert errors[0] == errors[1] == errors[2]
