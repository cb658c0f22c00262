"""The decoder's gated feed-forward network (used by `models.decoder`)."""

from __future__ import annotations

from torch import Tensor, nn

from mgvq_kernels import ops
from mgvq_runtime.layers.linear import LayerFactory, VQLinear


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one matrix."""

    def __init__(
        self, name: str, hidden_size: int, intermediate_size: int, bias: bool, factory: LayerFactory
    ) -> None:
        super().__init__()
        D, F = hidden_size, intermediate_size
        self.gate_up_proj = factory.linear(f"{name}.gate_up_proj", D, 2 * F, bias)
        self.down_proj = factory.linear(f"{name}.down_proj", F, D, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[T, D]` for `[T, D]`."""
        gate_up = self.gate_up_proj(x)  # [T, 2 F]
        if isinstance(self.down_proj, VQLinear):
            return self.down_proj(gate_up, gated=True)
        return self.down_proj(ops.swiglu(gate_up))
