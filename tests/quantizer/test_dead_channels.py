"""Inputs that are always zero and outputs without weights: stored exactly, harmful to nobody."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout
from mgvq_quantizer.gradients import Gradients
from mgvq_quantizer.ldl import without_dead_inputs
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Inputs, measure
from mgvq_quantizer.solver import Problem, solve
from mgvq_runtime.checkpoint.reader import open_checkpoint
from tests.quantizer.conftest import SMALL

Moment = Callable[[int, int], torch.Tensor]
RECIPE = QuantRecipe(bits=2.0, codebook_iterations=3, refit_rounds=2)
DEAD = [3, 4, 17]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_dead_inputs(moment: torch.Tensor) -> torch.Tensor:
    moment = moment.clone()
    moment[DEAD] = 0.0
    moment[:, DEAD] = 0.0
    return moment


def test_columns_of_dead_inputs_are_cleared_and_no_others(correlated: Moment) -> None:
    weight = torch.randn(8, 32, generator=seeded(0))
    moment = with_dead_inputs(correlated(32, 0))
    cleared = without_dead_inputs(weight, moment)
    alive = [i for i in range(32) if i not in DEAD]
    assert torch.equal(cleared[:, alive], weight[:, alive])
    assert not cleared[:, DEAD].any()
    assert without_dead_inputs(weight, correlated(32, 0)) is weight
    assert without_dead_inputs(weight, torch.zeros(32, 32)) is weight


@pytest.mark.parametrize("two_sided", [False, True])
def test_dead_rows_are_stored_exactly_whatever_the_others_are(
    correlated: Moment, two_sided: bool
) -> None:
    weight = torch.randn(48, 64, generator=seeded(1))
    weight[[0, 7, 47]] = 0.0
    factor = torch.eye(48, dtype=torch.float64) if two_sided else None
    case = Problem(weight, correlated(64, 1), None, VQLayout.uniform(48, 64, 2), (), factor)
    solution = solve([case], RECIPE, seeded(1))[0]
    dense = ops.vq_dequantize(solution.weight)
    assert torch.equal(dense[[0, 7, 47]], torch.zeros(3, 64))
    assert bool(torch.isfinite(dense).all())
    assert solution.error < 0.6 * solution.error_nearest


def test_a_matrix_without_any_weight_or_any_input_is_finite() -> None:
    layout = VQLayout.uniform(16, 32, 2)
    zero = Problem(torch.zeros(16, 32), torch.eye(32, dtype=torch.float64), None, layout)
    solution = solve([zero], RECIPE, seeded(2))[0]
    assert torch.equal(ops.vq_dequantize(solution.weight), torch.zeros(16, 32))
    assert solution.error == 0.0
    weight = torch.randn(16, 32, generator=seeded(2))
    unseen = replace(zero, weight=weight, hessian=torch.zeros(32, 32, dtype=torch.float64))
    near = ops.vq_dequantize(solve([unseen], RECIPE, seeded(2))[0].weight)
    assert float((near - weight).square().mean() / weight.square().mean()) < 0.3


def test_dead_channels_do_not_move_a_survey(correlated: Moment) -> None:
    """Huge weights at dead inputs change nothing, rows of zeros lose nothing."""
    weight = 0.05 * torch.randn(96, 128, generator=seeded(3))
    weight[5] = 0.0
    moment = with_dead_inputs(correlated(128, 3))
    inputs = Inputs(moment, moment, 0.25 * moment.diagonal())
    rows = torch.rand(96, generator=seeded(3), dtype=torch.float64)
    weight[:, DEAD] = 0.0
    loud = weight.clone()
    loud[:, DEAD] = 1e4
    loud[5] = 0.0
    quiet, noisy = (
        measure("m", w, inputs, Gradients({}, rows), RECIPE, lambda _: 0.125, seeded(1))
        for w in (weight, loud)
    )
    assert quiet == noisy
    kept = torch.arange(96) != 5
    fewer = measure(
        "m", weight[kept], inputs, Gradients({}, rows[kept]), RECIPE, lambda _: 0.125, seeded(1)
    )
    for with_row, without in zip(quiet.losses, fewer.losses, strict=True):
        assert with_row == pytest.approx(without, rel=0.25)


def damaged(small: Path, folder: Path, loudness: float) -> Path:
    """A copy whose first norm never lets channel 5 through, and whose outputs 2 and 9 are dead."""
    shutil.copytree(small, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][5] = 0.0
    for part in ("q", "k", "v"):
        tensors[f"model.layers.0.self_attn.{part}_proj.weight"][:, 5] = loudness
    tensors["model.layers.0.mlp.down_proj.weight"][[2, 9]] = 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("mismatch", [0.0, 0.5])
def test_end_to_end_dead_channels_change_nothing_else(
    small: Path, tmp_path: Path, mismatch: float
) -> None:
    """Weights of 1,000 that nothing reaches give the very bytes that zeros there give.

    An output that was dead makes up for its stream's error, where the recipe asks for that.
    """
    written = []
    for name, loudness in (("quiet", 0.0), ("loud", 1e3)):
        source = damaged(small, tmp_path / name, loudness)
        output = tmp_path / f"{name} out"
        recipe = QuantRecipe(**{**SMALL, "mismatch": mismatch})
        report = quantize(source, output, recipe, show_progress=False)
        assert report.kl < 0.1
        written.append((output / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    weights = dict(open_checkpoint(tmp_path / "loud out").vq_weights())
    down = ops.vq_dequantize(weights["model.layers.0.mlp.down_proj"])
    assert bool(down[[2, 9]].any()) == (mismatch > 0.0)
    assert down[[1, 3]].any()
