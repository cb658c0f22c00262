"""MGVQ under the conditions of its baselines, whole and with one setting changed (for `bench`).

The decoder alone is quantized; calibration, bits in full, tuning and questions are the baselines'.
Each entry of `CHANGES` takes a part out, or puts one in that is off by default; with lookups, and
with a trellis.

Source: method memo F.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mgvq_quantizer.allocation import matrix_shapes
from mgvq_runtime.checkpoint.bits import group_of

OURS = "MGVQ"
"""The label of the whole method."""
TRELLIS: Mapping[str, Any] = {"codec": "trellis"}
"""Settings of the whole method with a trellis for lookups."""
_LOOKUPS_ONLY = {"two-sided", "two-descents", "one-refit"}
_TRELLIS_ONLY = {"descent", "two-rounds"}

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "layer-budget": {"allocation": "layer"},
    "global-only": {"global_share": 1.0},
    "local-only": {"global_share": 0.0},
    "shared-survey": {"survey_bits": 2.5},  # rows of 2 to 3 bits can share it
    "unordered": {"allocation": "uniform", "permute": False},
    "one-refit": {"refit_rounds": 1},
    "descent": {"descent_sweeps": 1},  # in place of drawing out
    "two-descents": {"descent_sweeps": 2},
    "two-rounds": {"refit_rounds": 2},
    "own-tables": {"max_codebook_overhead": 100.0},
    "guided": {"guided": True},
    "two-sided": {"two_sided": True},
    "gradient-shift": {"gradient_shift": True},
    "no-mismatch": {"mismatch": 0.0},
    "no-draw-out": {"draw_out": 0.0},
    "draw-out": {"draw_out": 1.0},
    "channel-classes": {"channel_classes": True},
    "block-tuning": {"block_steps": 50},
    "no-bias-correction": {"bias_correction": False},
}
"""Settings of the recipe that an ablation changes, by its name."""


@dataclass(frozen=True)
class Variant:
    """MGVQ with some settings changed."""

    name: str
    label: str
    """What tables and plots call it."""
    settings: Mapping[str, Any]
    change: str = ""
    """A name of `CHANGES`; empty for the whole method."""
    base: str = ""
    """The label of the whole that the change is made to."""
    is_random: bool = True


def _variants() -> Iterator[Variant]:
    """Yield the whole method with lookups and with a trellis, each with its changes."""
    for name, label, settings, others in (
        ("mgvq", OURS, {}, _TRELLIS_ONLY),
        ("mgvq-trellis", f"{OURS}, trellis", TRELLIS, _LOOKUPS_ONLY),
    ):
        yield Variant(name, label, settings)
        for change, changed in CHANGES.items():
            if change in others:
                continue
            words = f"{label}, {change.replace('-', ' ')}"
            base = f"{label}, uniform" if change == "unordered" else label  # bands need an order
            yield Variant(f"{name}-{change}", words, {**settings, **changed}, change, base)


VARIANTS = {variant.name: variant for variant in _variants()}


def all_but_the_decoder(model: nn.Module) -> str:
    """Return `QuantRecipe.keep` for what the baselines leave alone."""
    names = [name for name in matrix_shapes(model) if group_of(name) != "decoder"]
    return ",".join(sorted({"visual.*" if n.startswith("visual.") else n for n in names}))
