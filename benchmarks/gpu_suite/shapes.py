"""The linears whose times matter: matrices of real decoders, as the runtime fuses them.

Called by the steps that time linears and by the tuner. Shapes only; no checkpoint is read.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Linear:
    """One matrix `[out_features, in_features]` of a model's decoder layer."""

    model: str
    name: str
    out_features: int
    in_features: int

    @property
    def num_weights(self) -> int:
        """Weights of the matrix."""
        return self.out_features * self.in_features


def decoder(model: str, hidden: int, intermediate: int, qkv: int) -> tuple[Linear, ...]:
    """List the four matrices of a layer: q, k, v fused, and gate and up fused."""
    return (
        Linear(model, "qkv_proj", qkv, hidden),
        Linear(model, "o_proj", hidden, hidden),
        Linear(model, "gate_up_proj", 2 * intermediate, hidden),
        Linear(model, "down_proj", hidden, intermediate),
    )


MODELS = {
    "Qwen2-VL-7B": decoder("Qwen2-VL-7B", 3584, 18944, (28 + 2 * 4) * 128),
    "Qwen2-VL-2B": decoder("Qwen2-VL-2B", 1536, 8960, (12 + 2 * 2) * 128),
    "InternVL2-8B": decoder("InternVL2-8B", 4096, 14336, (32 + 2 * 8) * 128),
}
"""By model, the most important first."""

TINY = (Linear("tiny", "o_proj", 40, 136),)
"""What the interpreter multiplies instead."""

ROWS = (1, 2, 4, 8, 16, 64, 512)
"""Rows of x that are timed: decode batches, then prefill chunks."""
