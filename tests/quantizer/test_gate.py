"""The gate: what it measures, what it refuses, and the whole run with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mgvq_kernels.layout import VQLayout
from mgvq_quantizer.batches import encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.curvature import SampleGradients
from mgvq_quantizer.dataset import read_data
from mgvq_quantizer.gate import MatrixEvidence, choose, score
from mgvq_quantizer.gradients import MatrixGradients, sample_gradients
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.solver import Problem, Solution, solve
from mgvq_quantizer.teacher import Student, ask_teacher
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.loading import fill_model
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents

Moment = Callable[[int, int], Tensor]
ROWS, WIDTH = 48, 32
ALL = {"two_sided": True, "gradient_shift": True}
RECIPE = QuantRecipe(**{**QUICK, **ALL, "codebook_iterations": 1, "tuning_steps": 0})


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(A: Tensor, B: Tensor, slope: Tensor, samples: int, seed: int) -> MatrixGradients:
    """Gradients with curvature `B x A` and, of the divergence, with a mean and a little noise."""
    left, right = (torch.linalg.cholesky(X).float() for X in (B, A))
    noise = left @ normal(samples, ROWS, WIDTH, seed=seed) @ right.T
    eyes = (torch.eye(ROWS),) * samples
    return MatrixGradients(
        SampleGradients(tuple(noise), eyes), SampleGradients(tuple(slope + 0.1 * noise), eyes)
    )


def case(correlated: Moment) -> tuple[Problem, Tensor, Tensor]:
    A = correlated(WIDTH, 0) + 0.02 * torch.eye(WIDTH)
    basis = torch.linalg.qr(normal(ROWS, ROWS, seed=1).double())[0]
    B = basis * torch.arange(1, ROWS + 1).double() ** -1.0 @ basis.T
    layout = VQLayout.uniform(ROWS, WIDTH, 2, has_permutation=True)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    return Problem(normal(ROWS, WIDTH, seed=3), A, order, layout), A, B


def solve_one(problem: Problem) -> Solution:
    trained = replace(RECIPE, codebook_iterations=3)
    return solve([problem], trained, torch.Generator().manual_seed(0))[0]


def test_the_score_is_the_second_order_loss(correlated: Moment) -> None:
    """Against a loss that is a quadratic: a linear layer's squared error over given samples."""
    x, change = normal(40, 5, WIDTH, seed=4), 0.1 * normal(ROWS, WIDTH, seed=5)
    g, k = normal(40, 5, ROWS, seed=6), normal(40, 5, ROWS, seed=7)
    gradients = MatrixGradients(
        SampleGradients(tuple(x), tuple(g)), SampleGradients(tuple(x), tuple(k))
    )
    slopes = torch.einsum("sto,oi,sti->s", k.double(), change.double(), x.double())
    bends = torch.einsum("sto,oi,sti->s", g.double(), change.double(), x.double())
    expected = float(slopes.mean() + bends.square().mean() / 2)
    assert score(gradients, change) == pytest.approx(expected, rel=1e-5)


def test_what_the_gradients_show_is_used(correlated: Moment) -> None:
    problem, A, B = case(correlated)
    slope = (B @ (0.3 * normal(ROWS, WIDTH, seed=8).double()) @ A).float()
    train, heldout = (drawn(A, B, slope, count, count) for count in (400, 200))
    evidence = MatrixEvidence(train, heldout)
    solution, verdict = choose(problem.weight, problem, evidence, RECIPE, solve_one)
    scores = verdict.scores
    assert list(scores) == ["plain", "two_sided", "shifted"]
    assert scores["shifted"] < scores["two_sided"] < 0.95 * scores["plain"]
    assert verdict.rounding == "shifted"
    assert verdict.shift in (0.25, 0.5, 1.0)
    assert solution.error > solve_one(problem).error
    only = replace(RECIPE, gradient_shift=False)
    assert choose(problem.weight, problem, evidence, only, solve_one)[1].rounding == "two_sided"


def test_what_held_out_samples_contradict_is_refused(correlated: Moment) -> None:
    """Training gradients of another curvature and the opposite slope: plain rounding stays."""
    problem, A, B = case(correlated)
    slope = (B @ (0.3 * normal(ROWS, WIDTH, seed=8).double()) @ A).float()
    train = drawn(A, torch.linalg.inv(B), -slope, 400, 9)
    evidence = MatrixEvidence(train, drawn(A, B, slope, 200, 10))
    solution, verdict = choose(problem.weight, problem, evidence, RECIPE, solve_one)
    assert verdict.rounding == "plain"
    assert verdict.shift is None
    assert set(verdict.scores) == {"plain", "two_sided"}
    plain = solve_one(problem)
    assert torch.equal(solution.weight.codes[0][0], plain.weight.codes[0][0])
    assert solution.error == plain.error


def test_both_sides_of_every_sample_make_its_gradient(dense: Path) -> None:
    """Against autograd of the divergence in the weight itself, sample by sample."""
    name = "model.layers.1.mlp.gate_up_proj"
    graph = fill_model(open_checkpoint(dense), torch.device("cpu")).float()
    samples = read_data(dense, graph, RECIPE, None).train
    batch = make_batch(samples, "cpu")
    with torch.no_grad():
        features = encode_pictures(graph, unique_pictures(samples), "cpu")
        reference = ask_teacher(graph, [batch], features)
        graph.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    found = sample_gradients(
        graph, [name], [batch], features, reference, torch.Generator().manual_seed(0), draws=3
    )[name]
    assert (len(found.divergence), len(found.likelihood)) == (len(samples), 3 * len(samples))
    weight = graph.get_submodule(name).weight.requires_grad_()
    for sample, (x, g) in zip(batch.samples, found.divergence.pairs(), strict=True):
        loss = Student(graph)(make_batch([sample], "cpu"), features, reference).sum()
        (wanted,) = torch.autograd.grad(loss, weight)
        assert float((g.T @ x - wanted).norm() / wanted.norm()) < 1e-3
    ones = torch.cat(found.likelihood.outputs)
    assert bool(torch.isfinite(ones).all())
    assert bool(ones.any())


@pytest.fixture(scope="module")
def gated(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("gated") / "checkpoint"
    return output, quantize(dense, output, RECIPE, show_progress=False)


def test_the_report_tells_which_rounding_every_matrix_got(gated: tuple[Path, Report]) -> None:
    facts = json.loads((gated[0] / "quantization_report.json").read_text())
    settings = open_checkpoint(gated[0]).quantization
    assert settings is not None
    assert {name: settings.recipe[name] for name in ALL} == ALL
    for name, matrix in facts["matrices"].items():
        if not name.startswith("model.layers."):
            assert matrix["gate"] is None
            continue
        scores = matrix["gate"]["scores"]
        assert {"plain", "two_sided"} <= set(scores)
        assert scores[matrix["gate"]["rounding"]] == min(scores.values())


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    dense: Path, gated: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after a block's second matrix: its statistics are those of before its first one."""
    save, saved = WorkFolder.save, []

    def stop_after(self: WorkFolder, name: str, solution: Solution) -> None:
        save(self, name, solution)
        saved.append(name)
        if name == "model.layers.1.self_attn.o_proj":
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkFolder, "save", stop_after)
    output = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, output, RECIPE, show_progress=False)
    report = quantize(dense, output, RECIPE, show_progress=False)
    assert len(saved) == len(set(saved))
    assert contents(output) == contents(gated[0])
    assert report.matrices == gated[1].matrices
