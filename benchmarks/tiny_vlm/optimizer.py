"""Muon for some matrices, AdamW for the rest, on flat shared vectors (called by `train`).

Muon (K. Jordan et al., 2024) steps along the nearest orthogonal matrix of the momentum, found by a
few Newton-Schulz iterations; its step is scaled to the size AdamW's would have (Liu et al., 2025,
arXiv 2502.16982). Workers own whole parameters, so that no matrix is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from benchmarks.tiny_vlm.recipe import Recipe

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
)
"""Coefficients of the iterations (Amsel et al., 2025, arXiv 2505.16932)."""
MUON_PARTS = ("visual.blocks.",)
"""Parameters whose matrices take Muon; in the decoder it costs more than it gains."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat vectors, and how it is stepped."""

    name: str
    start: int
    shape: tuple[int, ...]
    is_muon: bool
    pieces: int
    """Matrices stacked in it (3 for a fused qkv)."""

    @property
    def end(self) -> int:
        """One past its last element."""
        return self.start + prod(self.shape)

    @property
    def cost(self) -> float:
        """Rough work of one step."""
        if not self.is_muon:
            return 20.0 * prod(self.shape)
        rows, columns = sorted((self.shape[0] // self.pieces, self.shape[1]))
        return self.pieces * 4.0 * (2 * rows * rows * columns + rows**3) / 8


def make_slots(model: nn.Module) -> list[Slot]:
    """Slots of all parameters in the model's order."""
    slots, offset = [], 0
    for name, parameter in model.named_parameters():
        is_muon = parameter.ndim == 2 and any(part in name for part in MUON_PARTS)
        pieces = 3 if name.endswith("attn.qkv.weight") else 1
        slots.append(Slot(name, offset, tuple(parameter.shape), is_muon, pieces))
        offset += parameter.numel()
    return slots


def share_of(slots: list[Slot], rank: int, workers: int) -> list[Slot]:
    """The slots of one worker; the dearest first to the least loaded."""
    loads = [0.0] * workers
    mine = []
    for slot in sorted(slots, key=lambda slot: (-slot.cost, slot.start)):
        least = loads.index(min(loads))
        loads[least] += slot.cost
        if least == rank:
            mine.append(slot)
    return mine


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrix of `[r, c]`, roughly; bfloat16 is exact enough."""
    is_tall = x.shape[0] > x.shape[1]
    x = x.T.contiguous() if is_tall else x
    x = x / (x.norm() * 1.02 + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.T  # [r, r]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def muon_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    slot: Slot,
    recipe: Recipe,
    rate: float,
    dtype: torch.dtype,
) -> None:
    """One Muon step in place; all three flat, float32; the iterations run in `dtype`."""
    momentum.lerp_(gradient, 1 - recipe.muon_momentum)
    direction = gradient.lerp(momentum, recipe.muon_momentum).view(slot.shape)
    parts = [orthogonal(part) for part in direction.to(dtype).chunk(slot.pieces)]
    rows, columns = slot.shape[0] // slot.pieces, slot.shape[1]
    scale = 0.2 * max(rows, columns) ** 0.5 * rate
    weight.mul_(1 - rate * recipe.weight_decay)
    weight.add_(torch.cat(parts).flatten().float(), alpha=-scale)


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    recipe: Recipe,
    rate: float,
    step: int,
    has_decay: bool,
) -> None:
    """One AdamW step in place; all flat, float32."""
    m, v = moments
    m.lerp_(gradient, 1 - recipe.beta1)
    v.mul_(recipe.beta2).addcmul_(gradient, gradient, value=1 - recipe.beta2)
    bias1, bias2 = 1 - recipe.beta1 ** (step + 1), 1 - recipe.beta2 ** (step + 1)
    if has_decay:
        weight.mul_(1 - rate * recipe.weight_decay)
    weight.addcdiv_(m, (v / bias2).sqrt_().add_(1e-8), value=-rate / bias1)
