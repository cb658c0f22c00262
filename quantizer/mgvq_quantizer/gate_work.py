"""How much `gate.choose` adds to a plain rounding, counted from shapes (called by `stage_work`).

Named after the functions of `curvature`, `shift` and `gate` that are counted; whoever changes one
changes the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgvq_quantizer import solver_work as work
from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.gate import STEPS
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.solver_work import FACTOR, FORWARD, Work, total

_EIGENVECTORS = 5
"""Products `n^3` of a symmetric eigenproblem with its vectors."""


@dataclass(frozen=True)
class Asked:
    """Tokens of the gradients that a matrix is judged by."""

    train: int
    train_squares: int
    """Sum of the squared lengths of the training samples."""
    heldout: int
    """Each as often as labels are drawn for it."""


def choose(plan: MatrixPlan, recipe: QuantRecipe, asked: Asked, heldout: int) -> Work:
    """Count `gate.choose` without the plain rounding; every shift is taken to be tried.

    Args:
        plan: of the matrix.
        recipe: which ways.
        asked: tokens.
        heldout: tokens of the held-out samples, each once.
    """
    layout = plan.layout
    O, I = layout.out_features, layout.in_features  # noqa: E741
    one_score = Work({FORWARD: (heldout + asked.heldout) * O * I})
    parts = [one_score, _output_factor(O, I, asked)]

    def attempt(is_two_sided: bool) -> None:
        parts.append(work.solve([layout], recipe, plan.shared, is_two_sided))
        parts.append(one_score)

    if recipe.two_sided:
        attempt(True)
    if recipe.gradient_shift:
        parts.append(_gradient_shift(O, I, asked))
        parts.append(work.times(one_score, 1 + len(STEPS)))
        attempt(recipe.two_sided)
    return total(parts)


def _output_factor(O: int, I: int, asked: Asked) -> Work:  # noqa: E741
    return Work({FORWARD: asked.train_squares * (I + O) + asked.train * O * O})


def _gradient_shift(O: int, I: int, asked: Asked) -> Work:  # noqa: E741
    """`kronecker_scale`, `kronecker_basis`, `gradient_shift` and `within`."""
    turned = O * O * I + O * I * I
    scale = asked.train * (I * I + O * O) + asked.train_squares * (I + O)
    shift = asked.train * (I * I + O * O + O * I)
    return Work({FORWARD: scale + shift, FACTOR: _EIGENVECTORS * (O**3 + I**3) + 3 * turned})
