"""End-to-end tuning of a baseline's stored numbers, as `tuning` does it to ours (for `comparison`).

Scales, offsets and codebooks of the decoder's matrices, its norms and biases; codes are frozen. The
same loss, calibration conversations, number of steps, relative step sizes and choice of the best
held-out state as ours get, with the numbers as they would be stored. The token table is not
quantized here and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mgvq_quantizer.baselines.interface import Quantized, Values
from mgvq_quantizer.batches import MAX_TOKENS, Features, make_batch, split_batches
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.knobs import find_best
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Reference, Student, divergences, heldout_kl
from mgvq_runtime.models.causal_lm import CausalLM

_CODEBOOKS = "codebook"
"""Stored numbers whose names begin so take the recipe's steps for codebooks, others for scales."""


class _Knobs:
    """All trainable tensors of a model: `start + unit * delta`, so that one step size fits all."""

    def __init__(self, model: CausalLM, results: Mapping[str, Quantized]) -> None:
        self._results = results
        self._starts: dict[tuple[str, str], Tensor] = {}
        for name, result in results.items():
            for part, value in result.values.items():
                self._starts[name, part] = value
        for name, parameter in model.named_parameters():
            if not name.startswith("visual.") and parameter.dim() == 1:
                self._starts["", name] = parameter.detach().clone()
        self._units = {
            key: start.square().mean().sqrt().clamp_min(1e-6) for key, start in self._starts.items()
        }
        self.deltas = {
            key: torch.zeros_like(start, requires_grad=True) for key, start in self._starts.items()
        }

    def optimizer(self, recipe: QuantRecipe, share: float) -> torch.optim.Adam:
        """Return a fresh Adam with `share` of the recipe's step sizes."""
        books = [delta for (_, part), delta in self.deltas.items() if part.startswith(_CODEBOOKS)]
        rest = [d for (_, part), d in self.deltas.items() if not part.startswith(_CODEBOOKS)]
        groups = [
            {"params": books, "lr": share * recipe.codebook_lr},
            {"params": rest, "lr": share * recipe.scale_lr},
        ]
        return torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.98))

    def copy(self) -> list[Tensor]:
        """Return the present state."""
        return [delta.detach().clone() for delta in self.deltas.values()]

    @torch.no_grad()
    def put(self, state: Sequence[Tensor]) -> None:
        """Go back to a state that `copy` returned."""
        for delta, old in zip(self.deltas.values(), state, strict=True):
            delta.copy_(old)

    def parameters(self, *, stored: bool = False) -> dict[str, Tensor]:
        """Return the model's parameters by name, for gradients, or as they would be stored."""
        values = {key: s + self._units[key] * self.deltas[key] for key, s in self._starts.items()}
        parameters = {
            name: value.half().float() if stored else value
            for (matrix, name), value in values.items()
            if not matrix
        }
        for name, result in self._results.items():
            mine: Values = {part: values[name, part] for part in result.values}
            parameters[f"{name}.weight"] = result.decode(result.store(mine) if stored else mine)
        return parameters


@torch.enable_grad()
def tune_decoder(
    model: CausalLM,
    results: Mapping[str, Quantized],
    reference: Reference,
    samples: tuple[Sequence[list[Sample]], Sequence[Sample]],
    features: Features,
    recipe: QuantRecipe,
    progress: Callable[[str], None],
) -> tuple[float, float]:
    """Adjust the stored numbers of a quantized decoder, and put the best state into the model.

    Args:
        model: the quantized model; matrices, norms and biases of its decoder are replaced.
        results: its quantized matrices by name.
        reference: what the unquantized model says about these samples.
        samples: batches to train on, one a step; held out, to choose the step that is kept.
        features: rows of every picture.
        recipe: step sizes.
        progress: told what happens, in words.

    Returns:
        KL on the held-out samples before and after.
    """
    device, (batches, heldout) = reference.head.device, samples
    student, knobs = Student(model), _Knobs(model, results)
    held = [make_batch(part, device) for part in split_batches(heldout, MAX_TOKENS)]

    @torch.no_grad()
    def measure() -> float:
        values = _of_student(knobs.parameters(stored=True))
        return heldout_kl(student, values, held, features, reference)

    def loss(part: list[Sample]) -> Tensor:
        values = _of_student(knobs.parameters())
        return divergences(student, values, make_batch(part, device), features, reference).mean()

    def told(step: int, kl: float) -> None:
        progress(f"tuning, step {step}/{len(batches)}, held-out KL {kl:.4f}")

    before, after, _ = find_best(knobs, batches, loss, measure, recipe, told)
    with torch.no_grad():
        for name, value in knobs.parameters(stored=True).items():
            model.get_parameter(name).copy_(value)
    return before, after


def _of_student(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in parameters.items()}
