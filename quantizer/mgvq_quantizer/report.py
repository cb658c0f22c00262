"""What a quantization run did, as numbers (made by `pipeline`, printed by `cli`, drawn by
`report_page`).

Bits are counted in full by `mgvq_runtime.checkpoint.bits`: codes, codebooks (shared ones once), row
scales and permutations. Errors are the share of a layer's output energy that is lost on calibration
data, `tr(E A E^T) / tr(W A W^T)`.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.block_tuning import BlockTuned
from mgvq_quantizer.gate import Verdict
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.sensitivity import Sensitivity
from mgvq_quantizer.solver import Solution
from mgvq_quantizer.tuning import Tuned
from mgvq_runtime.checkpoint.bits import TOTAL, count_bits, group_of

KEPT, WITH_KEPT = "kept dense", "with kept"
"""Groups of a report with matrices that stay unquantized: those alone, and all matrices."""
_DENSE_BITS = 16


@dataclass(frozen=True)
class GroupReport:
    """One group of matrices."""

    weights: int
    bits_per_weight: float
    """In full."""
    error: float | None
    """Mean over the matrices, before tuning; None where some are not quantized."""


@dataclass(frozen=True)
class MatrixReport:
    """One matrix, before tuning."""

    bands: tuple[tuple[int, int], ...]
    """Rate and width in channels of each, from left to right."""
    bits_per_weight: float
    """In full, as if it paid alone for tables it shares."""
    shared_codebooks: bool
    error_nearest: float
    """With plain nearest codewords: no metric, no compensation, no refit."""
    error: float
    alone: float | None = None
    """`Sensitivity.alone`; None where the sensitivity was not measured."""
    reference_losses: tuple[float, ...] = ()
    """Nats an answer token of each run of channels at the reference rate."""
    picture_share: tuple[float, ...] = ()
    """`Sensitivity.picture_share`, by run of channels."""
    gate: Verdict | None = None
    """Which rounding was kept; None where there was only one."""
    classes: tuple[str, ...] = ()
    """Of each band: visual, textual or shared; empty where none were told apart."""


@dataclass(frozen=True)
class Report:
    """A whole run."""

    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    groups: Mapping[str, GroupReport]
    matrices: Mapping[str, MatrixReport]
    kl_rounded: float
    """Nats an answer token on held-out conversations, before tuning."""
    kl: float
    """The same of the written checkpoint."""
    tuning_steps_kept: int
    """0: no tuned state was better than the untuned one."""
    seconds: float
    """Of the last part of the run, where it was resumed."""
    peak_memory_bytes: int
    blocks: Mapping[str, BlockTuned] = field(default_factory=dict)
    """What tuning did to each block, by name; empty where they are left as rounded."""

    def with_kept(self, weights: int) -> Report:
        """Return the report with so many weights of matrices counted that stay float16."""
        if not weights:
            return self
        total = self.groups[TOTAL]
        bits = total.bits_per_weight * total.weights + _DENSE_BITS * weights
        everything = total.weights + weights
        return replace(
            self,
            groups={
                **self.groups,
                KEPT: GroupReport(weights, _DENSE_BITS, None),
                WITH_KEPT: GroupReport(everything, bits / everything, None),
            },
        )

    def to_bytes(self) -> bytes:
        """Return the report as JSON."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def table(self) -> str:
        """Return the report as lines to read."""
        lines = [f"{'group':<12}{'weights':>12}{'bits/weight':>13}{'output error':>14}"]
        for name, group in self.groups.items():
            error = "" if name == TOTAL or group.error is None else f"{group.error:14.5f}"
            lines.append(f"{name:<12}{group.weights:>12,}{group.bits_per_weight:>13.3f}{error}")
        lines.append(
            f"KL to the original on held-out conversations: {self.kl:.4f} nats an answer token "
            f"({self.kl_rounded:.4f} before tuning)"
        )
        lines.append(f"{self.seconds:.0f} s, {self.peak_memory_bytes / 2**20:.0f} MiB at the peak")
        return "\n".join(lines)


def make_report(
    plans: Mapping[str, MatrixPlan],
    solutions: Mapping[str, Solution],
    tuned: Tuned,
    recipe: QuantRecipe,
    calibration: Mapping[str, Any],
    seconds: float,
    sensitivities: Sequence[Sensitivity] = (),
    verdicts: Mapping[str, Verdict] | None = None,
) -> Report:
    """Collect what a run did.

    Args:
        plans: every quantized matrix.
        solutions: what became of each.
        tuned: what tuning kept.
        recipe: the settings.
        calibration: name, digest and size of the data.
        seconds: wall clock.
        sensitivities: of the matrices whose rates were chosen by them.
        verdicts: of the matrices that were rounded in several ways.
    """
    specs = {name: matrix.spec for name, matrix in plans.items()}
    groups = {}
    for group, count in count_bits(specs).items():
        errors = [s.error for n, s in solutions.items() if group in (TOTAL, group_of(n))]
        groups[group] = GroupReport(count.weights, count.bits_per_weight, sum(errors) / len(errors))
    measured = {sensitivity.name: sensitivity for sensitivity in sensitivities}
    matrices = {
        name: replace(
            _matrix_report(plans[name], solution, measured.get(name), recipe),
            gate=(verdicts or {}).get(name),
        )
        for name, solution in solutions.items()
    }
    return Report(
        recipe=recipe.to_json(),
        calibration=calibration,
        groups=groups,
        matrices=matrices,
        kl_rounded=tuned.kl_before,
        kl=tuned.kl_after,
        tuning_steps_kept=tuned.steps,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _matrix_report(
    plan: MatrixPlan, solution: Solution, measured: Sensitivity | None, recipe: QuantRecipe
) -> MatrixReport:
    matrix = MatrixReport(
        tuple((band.rate, band.width) for band in plan.layout.bands),
        count_bits({plan.name: plan.spec})[TOTAL].bits_per_weight,
        plan.shared,
        solution.error_nearest,
        solution.error,
        classes=plan.classes if recipe.channel_classes and group_of(plan.name) == "decoder" else (),
    )
    if measured is None:
        return matrix
    at = measured.rates.index(recipe.reference_rate)
    return replace(
        matrix,
        alone=measured.alone,
        reference_losses=tuple(losses[at] for losses in measured.losses),
        picture_share=measured.picture_share,
    )


def peak_memory_bytes() -> int:
    """Return the most main memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
