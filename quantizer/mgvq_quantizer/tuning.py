"""End-to-end tuning against the unquantized model, codes frozen (called by `pipeline`).

What a code means is adjusted, never which code a weight has: tables (float while they move, put
back on the int8 grid at the end), row scales, norms and biases. The loss is
KL(reference || quantized) on answer tokens; the state with the lowest KL on held-out samples,
measured as it would be stored, is kept - the untuned state too, if nothing beats it. Where a look
shows nothing better, tuning goes back to the best state and takes smaller steps.

Source: method memo D.4(b); QuIP# (arXiv 2402.04396), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQWeight
from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.batches import MAX_TOKENS, Features, make_batch, split_batches
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.codebook import decode, snap
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Reference, Student, Values, divergences, heldout_kl
from mgvq_runtime.models.causal_lm import CausalLM

CHECKS = 20
"""How often the held-out samples are looked at during tuning."""
_SMALLER = 0.4
"""What step sizes are multiplied with, from the best state on, when a look shows nothing better."""

T = TypeVar("T")


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


@dataclass(eq=False)
class _Knob:
    """One trainable tensor: `start + unit * delta`, so that one step size fits all."""

    start: Tensor
    unit: Tensor
    delta: Tensor

    @classmethod
    def around(cls, start: Tensor, unit: Tensor) -> _Knob:
        return cls(start, unit, torch.zeros_like(start, requires_grad=True))

    @property
    def value(self) -> Tensor:
        return self.start + self.unit * self.delta


class Knobs(Protocol):
    """Trainable tensors that `find_best` turns."""

    def optimizer(self, recipe: QuantRecipe, share: float) -> torch.optim.Optimizer:
        """Return a fresh optimizer with `share` of the recipe's step sizes."""

    def copy(self) -> list[Tensor]:
        """Return the present state."""

    def put(self, state: list[Tensor]) -> None:
        """Go back to a state that `copy` returned."""


class _Knobs:
    """All trainable tensors of a model, and the parameters they stand for."""

    def __init__(
        self, model: CausalLM, plans: Mapping[str, MatrixPlan], weights: Mapping[str, VQWeight]
    ) -> None:
        self.plans = {n: p for n, p in plans.items() if not n.startswith("visual.")}
        self.weights = {name: weights[name] for name in self.plans}
        self.tables: dict[str, _Knob] = {}
        self.scales: dict[str, _Knob] = {}
        self.others: dict[str, _Knob] = {}
        self._codes: dict[str, list[list[Tensor]]] = {}
        self._inverse: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            for names, books, units in zip(
                self.plans[name].tables, weight.codebooks, weight.codebook_scales, strict=True
            ):
                for key, book, unit in zip(names, books, units, strict=True):
                    table = book.float() * unit
                    self.tables[key] = _Knob.around(table, table.square().mean().sqrt())
            scales = weight.scales.float()
            self.scales[name] = _Knob.around(scales, scales)
            self._codes[name] = [[codes.long() for codes in band] for band in weight.codes]
            if weight.permutation is not None:
                self._inverse[name] = weight.permutation.long().argsort()
        matrices = {f"{name}.weight" for name in plans}
        for name, parameter in model.named_parameters():
            if not name.startswith("visual.") and name not in matrices and parameter.dim() == 1:
                value = parameter.detach().clone()
                unit = value.square().mean().sqrt().clamp_min(1e-3).expand_as(value)
                self.others[name] = _Knob.around(value, unit)

    def optimizer(self, recipe: QuantRecipe, share: float) -> torch.optim.Adam:
        """Return a fresh Adam with `share` of the recipe's step sizes."""
        tables = [knob.delta for knob in self.tables.values()]
        small = [knob.delta for knob in (*self.scales.values(), *self.others.values())]
        groups = [
            {"params": tables, "lr": share * recipe.codebook_lr},
            {"params": small, "lr": share * recipe.scale_lr},
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.98))

    def copy(self) -> list[Tensor]:
        """Return the present state."""
        return [knob.delta.detach().clone() for knob in self._all()]

    @torch.no_grad()
    def put(self, state: list[Tensor]) -> None:
        """Go back to a state that `copy` returned."""
        for knob, delta in zip(self._all(), state, strict=True):
            knob.delta.copy_(delta)

    def parameters(self) -> Values:
        """Return the model's parameters as functions of the knobs, by name, for gradients."""
        values = {f"model.{name}": knob.value for name, knob in self.others.items()}
        for name, codes in self._codes.items():
            tables = self._of_each_table(name, lambda key: self.tables[key].value)
            matrix = self.scales[name].value[:, None] * decode(codes, tables)  # [O, I]
            if name in self._inverse:
                matrix = matrix.index_select(1, self._inverse[name])
            values[f"model.{name}.weight"] = matrix
        return values

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, VQWeight], Values]:
        """Return what the present state is once it is stored: int8 tables, float16 the rest."""
        books = {key: snap(knob.value) for key, knob in self.tables.items()}
        weights = {}
        for name, weight in self.weights.items():
            mine = self._of_each_table(name, books.__getitem__)
            device = weight.scales.device
            weights[name] = VQWeight(
                weight.layout,
                weight.codes,
                tuple(tuple(book.entries for book in band) for band in mine),
                tuple(tuple(torch.tensor(b.scale, device=device) for b in band) for band in mine),
                self.scales[name].value.half(),
                weight.permutation,
            )
        return weights, {name: knob.value.half().float() for name, knob in self.others.items()}

    def _all(self) -> list[_Knob]:
        return [*self.tables.values(), *self.scales.values(), *self.others.values()]

    def _of_each_table(self, name: str, get: Callable[[str], T]) -> list[list[T]]:
        """Return [band][stage] what `get` gives for the names of a matrix's tables."""
        return [[get(table) for table in band] for band in self.plans[name].tables]


def tune(
    model: CausalLM,
    plans: Mapping[str, MatrixPlan],
    weights: Mapping[str, VQWeight],
    reference: Reference,
    samples: tuple[Sequence[Sample], Sequence[Sample]],
    features: Features,
    recipe: QuantRecipe,
    progress: Callable[[str], None],
) -> Tuned:
    """Adjust tables, row scales, norms and biases of the decoder and the embedding.

    Args:
        model: in dense arithmetic; not changed.
        plans: every quantized matrix.
        weights: their codes, tables and scales.
        reference: what the unquantized model says about all samples.
        samples: to train on; held out.
        features: rows of every picture, from the quantized vision tower.
        recipe: steps and step sizes.
        progress: told what happens, in words.

    Returns:
        The best state on the held-out samples.
    """
    device = reference.head.device
    student, knobs = Student(model), _Knobs(model, plans, weights)
    held = [make_batch(part, device) for part in split_batches(samples[1], MAX_TOKENS)]

    def measure() -> float:
        stored, others = knobs.stored()
        values = {f"model.{n}": v for n, v in others.items()}
        values |= {f"model.{n}.weight": ops.vq_dequantize(w) for n, w in stored.items()}
        return heldout_kl(student, values, held, features, reference)

    def loss(part: list[Sample]) -> Tensor:
        batch = make_batch(part, device)
        return divergences(student, knobs.parameters(), batch, features, reference).mean()

    before, after, steps = find_best(knobs, samples[0], loss, measure, recipe, progress)
    return Tuned(*knobs.stored(), before, after, steps)


def find_best(
    knobs: Knobs,
    samples: Sequence[Sample],
    loss: Callable[[list[Sample]], Tensor],
    measure: Callable[[], float],
    recipe: QuantRecipe,
    progress: Callable[[str], None],
) -> tuple[float, float, int]:
    """Turn knobs down the loss and leave them where the held-out samples liked them best.

    Args:
        knobs: changed in place.
        samples: dealt out in batches, each time in another order.
        loss: of one batch, a scalar with gradients.
        measure: the held-out KL of the knobs as they would be stored.
        recipe: steps and step sizes.
        progress: told what happens, in words.

    Returns:
        The held-out KL before and after, and the step that was kept; 0 if none was better.
    """
    before = best = measure()
    kept, best_step, share = knobs.copy(), 0, 1.0
    rng = np.random.default_rng(recipe.seed)
    optimizer = knobs.optimizer(recipe, share)
    queue: list[list[Sample]] = []
    for step in range(1, recipe.tuning_steps + 1):
        if not queue:
            shuffled = [samples[i] for i in rng.permutation(len(samples))]
            queue = split_batches(shuffled, recipe.tuning_batch_tokens)
        optimizer.zero_grad()
        loss(queue.pop()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % max(1, recipe.tuning_steps // CHECKS) == 0 or step == recipe.tuning_steps:
            now = measure()
            progress(f"tuning, step {step}/{recipe.tuning_steps}, held-out KL {now:.4f}")
            if now < best:
                best, best_step, kept = now, step, knobs.copy()
            else:
                share *= _SMALLER
                knobs.put(kept)
                optimizer = knobs.optimizer(recipe, share)
    knobs.put(kept)
    return before, best, best_step
