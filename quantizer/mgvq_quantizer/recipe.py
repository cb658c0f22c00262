"""The settings of one quantization run (read by `pipeline`; the command line is made from it).

Every field's docstring is its help on the command line; every default is written here and nowhere
else. Two runs with equal recipes, sources and calibration write the same bytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mgvq_runtime.errors import ConfigError

RATES = (1, 2, 3, 4)
"""Bits a weight this release can give to a whole group of matrices."""

_LEAST = {
    "max_samples": 2,
    "max_pictures": 1,
    "max_image_tokens": 1,
    "codebook_iterations": 1,
    "refit_rounds": 1,
    "tuning_batch_tokens": 1,
    "descent_sweeps": 0,
    "picture_swaps": 0,
    "tuning_steps": 0,
}


@dataclass(frozen=True)
class QuantRecipe:
    """Settings of a run; every one of them changes the result, so a resumed run needs the same.

    Raises:
        ConfigError: if a value is out of range, naming the field.
    """

    bits: int = 2
    """Bits a weight of the decoder's linear layers: 1, 2, 3 or 4."""
    vision_bits: int = 4
    """Bits a weight of the vision tower and the merger."""
    embedding_bits: int = 4
    """Bits a weight of the token embedding and the output head."""
    seed: int = 0
    """Seed of codebooks, permutations and tuning batches."""
    max_samples: int = 512
    """Most calibration conversations to use; they are drawn evenly from the file."""
    max_pictures: int = 96
    """Most calibration pictures for the vision tower; the decoder sees all of them."""
    max_image_tokens: int | None = None
    """Most tokens of one calibration picture, larger ones are scaled down; when not given, the
    default of the model's family, which is what a server takes too."""
    heldout_share: float = 0.125
    """Share of the calibration conversations kept aside to stop tuning and to report KL."""
    damping: float = 0.01
    """Share of the mean diagonal added to a layer's second moment before it is factored."""
    codebook_iterations: int = 20
    """Rounds of expectation-maximisation that start a codebook."""
    refit_rounds: int = 4
    """Rounds of re-assignment and least-squares refit of codebooks and row scales."""
    descent_sweeps: int = 2
    """Coordinate descent passes over the codes after each assignment."""
    max_codebook_overhead: float = 0.15
    """Bits a weight a matrix may spend on tables of its own; above it they are shared by kind."""
    permute: bool = True
    """Order input channels by sensitivity, sorted or interleaved, and store the order."""
    tuning_steps: int = 200
    """Steps of end-to-end tuning against the unquantized model; 0 switches it off."""
    picture_swaps: int = 4
    """How often tuning repeats each conversation with other pictures of the same size."""
    tuning_batch_tokens: int = 2048
    """Tokens a tuning step sees, at least one conversation."""
    codebook_lr: float = 1e-3
    """Adam's first step for codebooks, relative to each codebook's root mean square."""
    scale_lr: float = 5e-4
    """Adam's first step for row scales, norms and biases, relative to their own size."""

    def __post_init__(self) -> None:
        for name in ("bits", "vision_bits", "embedding_bits"):
            value = getattr(self, name)
            if value not in RATES:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(str, RATES))}, got {value}; mixed and "
                    "fractional rates come in a later release"
                )
        for name in ("damping", "heldout_share", "codebook_lr", "scale_lr"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{name} must lie between 0 and 1, got {value}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)

    def rate_of(self, group: str) -> int:
        """Return the bits of a group of `mgvq_runtime.checkpoint.bits.group_of`."""
        rates = {"embedding": self.embedding_bits}
        rates |= dict.fromkeys(("vision", "projector"), self.vision_bits)
        return rates.get(group, self.bits)
