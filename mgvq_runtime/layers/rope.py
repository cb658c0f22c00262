"""Cosines and sines of rotary embeddings: M-RoPE of the decoder, 2-D of the vision tower.

Computed once a forward in float32 and shared by all layers; the rotation itself (rotate-half) is
`mgvq_kernels.ops.rope`. 1-D rope is M-RoPE with three equal positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """Return `[width/2]` float32: theta ** (-2 i / width), on the CPU even under a meta device."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    return 1.0 / (theta ** (steps / width))


def llama3_frequencies(
    inv_freq: Tensor, factor: float, low: float, high: float, original_length: int
) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and blend those in between.

    Args:
        inv_freq: `[width/2]` float32.
        factor: How much longer the context became.
        low: Turns within the original length below which a pair is divided.
        high: Turns above which it is kept.
        original_length: The context the frequencies were made for.

    Source: Llama 3.1; transformers 5.24 `modeling_rope_utils._compute_llama3_parameters`.
    """
    turns = original_length * inv_freq / (2 * math.pi)  # [width/2]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


class MRope(nn.Module):
    """Three position axes share the frequency pairs of one head, in contiguous sections.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """

    def __init__(self, inv_freq: Tensor, sections: Sequence[int], magnitude: float = 1.0) -> None:
        """Note which axis and which frequency each pair uses.

        Args:
            inv_freq: `[Dh/2]` float32 angle of each pair at position 1.
            sections: Pairs of the time, height and width axis; they sum to Dh / 2.
            magnitude: What cosines and sines are multiplied by.
        """
        super().__init__()
        self.magnitude = magnitude
        axis = torch.arange(len(sections), device="cpu")
        axis = axis.repeat_interleave(torch.tensor(sections, device="cpu"))  # [Dh/2] int64
        self.register_buffer("axis", axis, persistent=False)
        self.register_buffer("inv_freq", inv_freq.unsqueeze(1), persistent=False)  # [Dh/2, 1]
        self.axis: Tensor
        self.inv_freq: Tensor

    def set_frequencies(self, inv_freq: Tensor) -> None:
        """Turn by other angles `[Dh/2]` from now on."""
        self.inv_freq = inv_freq.unsqueeze(1).to(self.inv_freq.device)

    @torch.no_grad()
    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[T, Dh]` float32 for positions `[3, T]` int64."""
        angles = positions.index_select(0, self.axis).float() * self.inv_freq  # [Dh/2, T]
        angles = torch.cat((angles, angles)).t()  # [T, Dh]
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.magnitude == 1.0 else (cos * self.magnitude, sin * self.magnitude)


class VisionRope(nn.Module):
    """2-D rope of the vision tower: half the pairs turn with the row, half with the column."""

    def __init__(self, head_dim: int, theta: float, merge_size: int) -> None:
        """Precompute the `Dh/4` frequencies both axes use.

        Args:
            head_dim: Dh, a multiple of 4.
            theta: Base of the frequencies.
            merge_size: Side of the patch blocks that lie together in the sequence.
        """
        super().__init__()
        self.merge_size = merge_size
        inv_freq = inverse_frequencies(head_dim // 2, theta)  # [Dh/4]
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.inv_freq: Tensor

    @torch.no_grad()
    def forward(self, grid_thw: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[P, Dh]` float32 of all images' patches, end to end."""
        device = self.inv_freq.device
        parts = [patch_positions(grid, self.merge_size, device) for grid in grid_thw]
        positions = parts[0] if len(parts) == 1 else torch.cat(parts)  # [P, 2]
        angles = (positions.float().unsqueeze(-1) * self.inv_freq).flatten(1)  # [P, Dh/2]
        angles = torch.cat((angles, angles), dim=-1)  # [P, Dh]
        return angles.cos(), angles.sin()


def patch_positions(
    grid_thw: tuple[int, int, int], merge_size: int, device: torch.device
) -> Tensor:
    """Return `[t*h*w, 2]` int64: row and column of each patch, in block-major merge order."""
    t, h, w = grid_thw
    rows = torch.arange(h, device=device).view(h // merge_size, 1, merge_size, 1)
    columns = torch.arange(w, device=device).view(1, w // merge_size, 1, merge_size)
    shape = (h // merge_size, w // merge_size, merge_size, merge_size)
    frame = torch.stack((rows.expand(shape), columns.expand(shape)), dim=-1).view(h * w, 2)
    return frame.repeat(t, 1)
