"""Gradients, token weights and losses against the definitions they are short for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_quantizer import calibration
from mgvq_quantizer.batches import embed, encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.gradients import Gradients, squared_gradients, token_weights
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Inputs, measure, run_widths
from mgvq_quantizer.solver import Problem, solve
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor

Moment = Callable[[int, int], torch.Tensor]
RECIPE = QuantRecipe(bits=2.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples_of(dense: Path, graph: CausalLM) -> list[calibration.Sample]:
    _, conversations = calibration.load_conversations(None, dense)
    processor = ChatProcessor.from_checkpoint(open_checkpoint(dense), graph.config, 64)
    return calibration.prepare(conversations[:2], processor, processor.tokenizer)


def test_squared_gradients_are_those_of_finite_differences(dense: Path) -> None:
    """Nudge one output of one matrix at one token and watch the loss of the drawn labels."""
    graph = load_model(dense).double()
    samples = samples_of(dense, graph)
    features = {
        k: v.double() for k, v in encode_pictures(graph, unique_pictures(samples), "cpu").items()
    }
    batch = make_batch(samples, "cpu")
    name = "model.layers.1.self_attn.o_proj"
    found = squared_gradients(graph, [name], [batch], features, seeded(3))[name]
    module = graph.get_submodule(name)

    def loss(token: int, output: int, nudge: float) -> float:
        def push(_: object, __: object, value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[token, output] += nudge
            return value

        handle = module.register_forward_hook(push)
        with torch.no_grad():
            rows = embed(graph, batch, features)
            logits = graph.lm_head(graph(rows, batch.forward)[batch.answer_rows])
        handle.remove()
        log_probs = logits.log_softmax(-1)
        return -float(log_probs.gather(1, labels).sum())

    with torch.no_grad():
        rows = embed(graph, batch, features)
        chances = graph.logits(graph(rows, batch.forward)[batch.answer_rows]).softmax(-1)
    labels = torch.multinomial(chances, 1, generator=seeded(3))
    token = int(batch.answer_rows[1])
    energy = torch.cat([found.energies[id(s)] for s in batch.samples])[token]
    step = 1e-4
    gradients = [
        (loss(token, o, step) - loss(token, o, -step)) / (2 * step)
        for o in range(module.weight.shape[0])
    ]
    assert float(energy) == pytest.approx(sum(g * g for g in gradients), rel=1e-3)
    everything = sum(float(found.energies[id(s)].double().sum()) for s in samples)
    assert float(found.rows.sum()) == pytest.approx(everything, rel=1e-5)


def test_tokens_without_gradient_keep_their_modalitys_share() -> None:
    ids = np.array([7, 9, 9, 9, 5, 5, 5, 5])
    sample = SimpleNamespace(token_ids=ids)
    energy = torch.tensor([0.0, 6.0, 0.0, 0.0, 8.0, 0.0, 0.0, 2.0])
    gradients = Gradients({id(sample): energy})
    weights = token_weights(gradients, [sample], 9)[id(sample)]  # type: ignore[list-item]
    picture, text = 0.3 * 2.0, 0.3 * 2.0  # the means of both are 2
    expected = 0.7 * energy + torch.tensor([text, *[picture] * 3, *[text] * 4])
    assert torch.allclose(weights, expected / expected.mean())
    none = token_weights(Gradients({id(sample): torch.zeros(8)}), [sample], 9)  # type: ignore[list-item]
    assert torch.equal(none[id(sample)], torch.ones(8))


def case(correlated: Moment, seed: int) -> tuple[torch.Tensor, Inputs, Gradients]:
    weight = 0.05 * torch.randn(96, 128, generator=seeded(seed))
    plain, weighted = correlated(128, seed), correlated(128, seed + 1)
    rows = torch.rand(96, generator=seeded(seed), dtype=torch.float64)
    return weight, Inputs(plain, weighted, 0.25 * weighted.diagonal()), Gradients({}, rows)


def test_losses_sum_to_what_was_measured_and_fall_with_the_rate(correlated: Moment) -> None:
    """Measured up to the reference rate of 2; above it they fall as the layer's own do."""
    weight, inputs, gradients = case(correlated, 0)
    asked: list[torch.Tensor] = []

    def alone(values: torch.Tensor) -> float:
        asked.append(values)
        return 0.75 if len(asked) == 1 else 0.125

    found = measure("m", weight, inputs, gradients, RECIPE, alone, seeded(1))
    assert found.widths == (32,) * 4
    totals = torch.tensor(found.losses).sum(0)
    assert RECIPE.rates[:2] == (1, 2)
    assert totals[:2].tolist() == pytest.approx([0.75, 0.125])
    # 3 bits have 3,072 numbers in their tables, much for a matrix this small.
    assert bool((totals[1:] < 0.7 * totals[:-1]).all())
    errors = [float((weight - values).square().sum()) for values in asked]
    assert len(errors) == 2
    assert errors[0] > 2 * errors[1]
    assert found.alone == 0.125
    assert found.picture_share == pytest.approx((0.25,) * 4)


def test_with_one_curvature_the_losses_are_those_of_the_layer(correlated: Moment) -> None:
    """The ratio between two rates is the ratio of `sum_i b_i e_i A e_i^T`, whatever the order."""
    weight, inputs, gradients = case(correlated, 5)
    recipe = QuantRecipe(bits=2.0, global_share=1.0, refit_rounds=1, descent_sweeps=0)
    found = measure("m", weight, inputs, gradients, recipe, lambda _: 1.0, seeded(1))
    order = inputs.weighted.diagonal().argsort(stable=True)
    forms = {}
    for rate in (2, 3):
        layout = VQLayout.uniform(96, 128, rate, has_permutation=True)
        quick = QuantRecipe(refit_rounds=1, draw_out=0.0, codebook_iterations=4)
        problem = Problem(weight, inputs.weighted, order, layout)
        solution = solve([problem], quick, seeded(1))[0]
        error = (weight - ops.vq_dequantize(solution.weight)).double()
        damped = inputs.weighted + 0.01 * inputs.weighted.diagonal().mean() * torch.eye(128)
        forms[rate] = float((((error @ damped) * error).sum(1) * gradients.rows).sum())
    totals = torch.tensor(found.losses).sum(0)
    at = recipe.rates.index
    assert float(totals[at(3)] / totals[at(2)]) == pytest.approx(forms[3] / forms[2], rel=1e-4)


def test_runs_are_as_narrow_as_bands_may_be() -> None:
    assert run_widths(768) == (32,) * 24
    assert run_widths(1536) == (128,) * 12
    assert run_widths(1032) == (1032,)
