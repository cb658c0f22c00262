"""What tuning turns while codes stay, and how (called by `tuning` and `block_tuning`).

Tables are float while they move and go back on the int8 grid at the end; row scales, norms and
biases become float16. `find_best` turns them down a loss and keeps the state that held-out samples
liked best, measured as it would be stored - the untuned one too, if nothing beats it. Where a look
shows nothing better, it goes back to the best state and takes smaller steps. It also tunes the
stored numbers of baselines, which bring knobs of their own.
Not here: losses, models, where the best state is put.

Source: method memo D.4; QuIP# (arXiv 2402.04396), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQWeight
from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.codebook import Codebook, decode, entries_of, snap
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Values

CHECKS = 10
"""How often the held-out samples are looked at during tuning; 20 found no better state."""
_SMALLER = 0.4
"""What step sizes are multiplied with, from the best state on, when a look shows nothing better."""

T = TypeVar("T")


class Knobs(Protocol):
    """Trainable tensors that `find_best` turns."""

    def optimizer(self, recipe: QuantRecipe, share: float) -> torch.optim.Optimizer:
        """Return a fresh optimizer with `share` of the recipe's step sizes."""

    def copy(self) -> list[Tensor]:
        """Return the present state."""

    def put(self, state: list[Tensor]) -> None:
        """Go back to a state that `copy` returned."""


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


class MatrixKnobs:
    """Tables and row scales of quantized matrices, and the vectors beside them."""

    def __init__(
        self,
        plans: Mapping[str, MatrixPlan],
        weights: Mapping[str, VQWeight],
        vectors: Mapping[str, Tensor],
        fixed: Collection[str] = (),
    ) -> None:
        """Start from what was rounded.

        Args:
            plans: the matrices, by name.
            weights: their codes, tables and scales; others are left alone.
            vectors: norms and biases by name, `[D]` float32; copied.
            fixed: names of the tables that stay as they are.
        """
        self.plans = plans
        self.weights = {name: weights[name] for name in plans}
        self.tables: dict[str, _Knob] = {}
        self.scales: dict[str, _Knob] = {}
        self.others: dict[str, _Knob] = {}
        self._fixed: dict[str, Codebook] = {}
        self._codes: dict[str, list[list[Tensor]]] = {}
        self._inverse: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            for names, books, units in zip(
                plans[name].tables, weight.codebooks, weight.codebook_scales, strict=True
            ):
                for key, book, unit in zip(names, books, units, strict=True):
                    if key in fixed:
                        self._fixed[key] = Codebook(book, float(unit))
                        continue
                    table = book.float() * unit
                    self.tables[key] = _Knob.around(table, table.square().mean().sqrt())
            scales = weight.scales.float()
            self.scales[name] = _Knob.around(scales, scales)
            self._codes[name] = entries_of(weight)
            if weight.permutation is not None:
                self._inverse[name] = weight.permutation.long().argsort()
        for name, vector in vectors.items():
            value = vector.detach().clone()
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
        values = {name: knob.value for name, knob in self.others.items()}
        fixed = {key: book.values for key, book in self._fixed.items()}
        for name, codes in self._codes.items():
            tables = self._of_each_table(
                name, lambda key: fixed[key] if key in fixed else self.tables[key].value
            )
            matrix = self.scales[name].value[:, None] * decode(codes, tables)  # [O, I]
            if name in self._inverse:
                matrix = matrix.index_select(1, self._inverse[name])
            values[f"{name}.weight"] = matrix
        return values

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, VQWeight], Values]:
        """Return what the present state is once it is stored: int8 tables, float16 the rest."""
        books = {key: snap(knob.value) for key, knob in self.tables.items()} | self._fixed
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

    def stored_parameters(self) -> Values:
        """Return the model's parameters as `stored` makes them, by name."""
        weights, others = self.stored()
        return others | {f"{n}.weight": ops.vq_dequantize(w) for n, w in weights.items()}

    def _all(self) -> list[_Knob]:
        return [*self.tables.values(), *self.scales.values(), *self.others.values()]

    def _of_each_table(self, name: str, get: Callable[[str], T]) -> list[list[T]]:
        """Return [band][stage] what `get` gives for the names of a matrix's tables."""
        return [[get(table) for table in band] for band in self.plans[name].tables]


def find_best(
    knobs: Knobs,
    batches: Sequence[list[Sample]],
    loss: Callable[[list[Sample]], Tensor],
    measure: Callable[[], float],
    recipe: QuantRecipe,
    progress: Callable[[int, float], None],
) -> tuple[float, float, int]:
    """Turn knobs down the loss and leave them where the held-out samples liked them best.

    Args:
        knobs: changed in place.
        batches: one a step of the optimizer; none measures only.
        loss: of one batch, a scalar with gradients.
        measure: the loss of the held-out samples, with the knobs as they would be stored.
        recipe: step sizes.
        progress: told each look at the held-out samples: the step, and what was measured.

    Returns:
        What was measured before and after, and the step that was kept; 0 if none was better.
    """
    before = best = measure()
    kept, best_step, share = knobs.copy(), 0, 1.0
    optimizer = knobs.optimizer(recipe, share)
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % max(1, len(batches) // CHECKS) == 0 or step == len(batches):
            now = measure()
            progress(step, now)
            if now < best:
                best, best_step, kept = now, step, knobs.copy()
            else:
                share *= _SMALLER
                knobs.put(kept)
                optimizer = knobs.optimizer(recipe, share)
    knobs.put(kept)
    return before, best, best_step
