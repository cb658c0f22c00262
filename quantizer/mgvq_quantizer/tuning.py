"""End-to-end tuning against the unquantized model, codes frozen (called by `pipeline`).

What a code means is adjusted, never which code a weight has. The loss is
KL(reference || quantized) on answer tokens, over all blocks at once; `block_tuning` has gone before
it, block by block.
Not here: what moves and which state is kept (`knobs`).

Source: method memo D.4(b); QuIP# (arXiv 2402.04396), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mgvq_kernels.layout import VQWeight
from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.batches import MAX_TOKENS, Features, make_batch, split_batches
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.knobs import MatrixKnobs, find_best
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Reference, Student, Values, divergences, heldout_kl
from mgvq_runtime.models.causal_lm import CausalLM


@dataclass(frozen=True, eq=False)
class Tuned:
    """The state that was kept."""

    weights: dict[str, VQWeight]
    parameters: Values
    """Norms and biases that changed, by name; every value a float16."""
    kl_before: float
    kl_after: float
    """Nats an answer token on held-out samples, as stored."""
    steps: int


def tune(
    model: CausalLM,
    plans: Mapping[str, MatrixPlan],
    weights: Mapping[str, VQWeight],
    reference: Reference,
    samples: tuple[Sequence[list[Sample]], Sequence[Sample]],
    features: Features,
    recipe: QuantRecipe,
    progress: Callable[[str], None],
) -> Tuned:
    """Adjust tables, row scales, norms and biases of the decoder and the embedding.

    Args:
        model: in dense arithmetic; not changed.
        plans: every quantized matrix.
        weights: their codes, tables and scales.
        reference: what the unquantized model says about these samples.
        samples: batches to train on, one a step; held out, to choose the step that is kept.
        features: rows of every picture, from the quantized vision tower.
        recipe: step sizes.
        progress: told what happens, in words.

    Returns:
        The best state on the held-out samples.
    """
    device, (batches, heldout) = reference.head.device, samples
    mine = {name: plan for name, plan in plans.items() if not name.startswith("visual.")}
    vectors = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("visual.") and parameter.dim() == 1
    }
    student, knobs = Student(model), MatrixKnobs(mine, weights, vectors)
    held = [make_batch(part, device) for part in split_batches(heldout, MAX_TOKENS)]

    def measure() -> float:
        values = _of_student(knobs.stored_parameters())
        return heldout_kl(student, values, held, features, reference)

    def loss(part: list[Sample]) -> Tensor:
        batch, values = make_batch(part, device), _of_student(knobs.parameters())
        return divergences(student, values, batch, features, reference).mean()

    def told(step: int, kl: float) -> None:
        progress(f"tuning, step {step}/{len(batches)}, held-out KL {kl:.4f}")

    before, after, steps = find_best(knobs, batches, loss, measure, recipe, told)
    return Tuned(*knobs.stored(), before, after, steps)


def _of_student(values: Values) -> Values:
    return {f"model.{name}": value for name, value in values.items()}
