"""One matrix rounded in several ways; held-out gradients choose (called by `stream`).

Curvature from few samples misleads in some matrices, early ones above all, and nothing in the
samples it was made from shows where. So every way is rounded out and scored on samples that were
kept aside, by what the end loss would do: `E_s[<K_s, D>] + 1/2 E_s[<G_s, D>^2]`, `D` the change of
the weight, `K_s` the gradient of the divergence and `G_s` that of drawn labels. Plain one-sided
rounding is always among them, so that the others can be refused.
Not here: the rounding itself (`solver`), where gradients come from (`witness`).

Source: method memo C.5, C.7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mgvq_kernels import ops
from mgvq_quantizer.curvature import kronecker_scale, output_factor
from mgvq_quantizer.gradients import MatrixGradients
from mgvq_quantizer.ldl import damp
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.shift import gradient_shift, kronecker_basis, within
from mgvq_quantizer.solver import Problem, Solution
from mgvq_quantizer.two_sided import form

STEPS = (0.25, 0.5, 1.0)
"""Shares of a gradient shift that are tried, besides none (memo C.5: gamma)."""


@dataclass(frozen=True, eq=False)
class MatrixEvidence:
    """What is known about one matrix beyond the second moment of its inputs."""

    train: MatrixGradients
    heldout: MatrixGradients


@dataclass(frozen=True)
class Verdict:
    """Which rounding of a matrix was kept, and why."""

    rounding: str
    """plain, two_sided or shifted."""
    scores: Mapping[str, float]
    """Nats a conversation that each one tried adds to the loss, to second order: less is better."""
    shift: float | None = None
    """The share of the gradient shift that was tried; None where held-out samples refused all."""


@dataclass(frozen=True, eq=False)
class _Trial:
    """One way of rounding, rounded out."""

    problem: Problem
    solution: Solution
    change: Tensor
    """`[O, I]` float32: of the original weight."""


def score(gradients: MatrixGradients, change: Tensor) -> float:
    """Return what a change of a weight adds to the mean loss of a sample, to second order.

    Args:
        gradients: of the matrix, on samples that had no part in the change.
        change: `[O, I]`.

    Returns:
        Nats; negative where the slope of the divergence outweighs the curvature.
    """
    slope = gradients.divergence.products(change).mean()
    bend = gradients.likelihood.products(change).square().mean()
    return float(slope + bend / 2)


def choose(
    original: Tensor,
    problem: Problem,
    evidence: MatrixEvidence,
    recipe: QuantRecipe,
    solve_one: Callable[[Problem], Solution],
) -> tuple[Solution, Verdict]:
    """Round a matrix in every way the recipe asks for and keep the one with the lowest score.

    Shifts start from the better of plain and two-sided.

    Args:
        original: `[O, I]`: the weight that all changes are told from.
        problem: without curvature of outputs; its weight may be moved from `original` already.
        evidence: gradients at the matrix.
        recipe: which ways, and how far.
        solve_one: rounds a problem; equal problems give equal solutions.

    Returns:
        The solution that was kept, its error measured against the weight of `problem`, and why.
    """
    trials: dict[str, _Trial] = {}
    scores: dict[str, float] = {}

    def attempt(name: str, changed: Problem) -> None:
        trials[name] = _try(original, problem, A, changed, solve_one)
        scores[name] = score(evidence.heldout, trials[name].change)

    A = damp(problem.hessian, recipe.damping)
    attempt("plain", problem)
    B = output_factor(evidence.train.likelihood, recipe.output_shrink)
    if recipe.two_sided:
        attempt("two_sided", replace(problem, output_factor=B))
    base = trials[min(scores, key=scores.__getitem__)]
    share = None
    if recipe.gradient_shift:
        scale = kronecker_scale(evidence.train.likelihood, A, B)
        if scale > 0.0:
            basis = kronecker_basis(A, B, scale)
            shift = gradient_shift(evidence.train.divergence, basis, recipe.shift_threshold)
            shift = within(shift, base.change, basis, recipe.shift_radius)
            share = _step(evidence.heldout, base.change, shift)
        if share is not None:
            attempt("shifted", base.problem.moved(share * shift))
    best = min(scores, key=scores.__getitem__)
    return trials[best].solution, Verdict(best, scores, share)


def _try(
    original: Tensor,
    problem: Problem,
    A: Tensor,
    changed: Problem,
    solve_one: Callable[[Problem], Solution],
) -> _Trial:
    """Round a changed problem; its error is told against the weight of the one before."""
    solution = solve_one(changed)
    rounded = ops.vq_dequantize(solution.weight)
    if changed.weight is not problem.weight:
        energy = form(problem.weight.double(), A, None)
        error = form((rounded - problem.weight).double(), A, None) / max(energy, 1e-30)
        solution = replace(solution, error=error)
    return _Trial(changed, solution, (rounded - original).float())


def _step(heldout: MatrixGradients, change: Tensor, shift: Tensor) -> float | None:
    """The share of a shift that helps most before rounding; None if all of them do harm."""
    scores = {share: score(heldout, change + share * shift.to(change)) for share in (0.0, *STEPS)}
    return min(scores, key=scores.__getitem__) or None
