"""Root-mean-square norm, alone or fused with the residual sum (used by `models.decoder`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgvq_kernels import ops


class RMSNorm(nn.Module):
    """Normalise the last axis by its root mean square, in float32, and scale it."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of `[T, D]`."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of `x + residual`, and that sum, both `[T, D]`."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
