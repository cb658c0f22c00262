"""Tuning lowers the divergence it measures, keeps codes, and returns what can be stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from mgvq_quantizer import calibration
from mgvq_quantizer.allocation import plan
from mgvq_quantizer.batches import embed, encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.teacher import Reference, divergence
from mgvq_quantizer.tuning import tune
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.tokenizer import Tokenizer


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
    recipe = QuantRecipe(tuning_steps=20, tuning_batch_tokens=256)
    said: list[str] = []
    plans = plan(graph, recipe)
    parts = (samples[:-1], samples[-1:])
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
    still = dataclasses.replace(recipe, tuning_steps=0)
    untouched = tune(graph, plans, weights, reference, parts, features, still, said.append)
    assert untouched.kl_after == untouched.kl_before
    for name, weight in untouched.weights.items():
        assert torch.equal(weight.codebooks[0][0], weights[name].codebooks[0][0])
        assert torch.equal(weight.scales, weights[name].scales)
