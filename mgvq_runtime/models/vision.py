"""The vision tower: one pre-norm ViT, shaped by `VisionConfig` (used by families).

In: flattened patches of any number of images, end to end. Out: one row a patch. Patches attend
within their own frame only. What makes decoder rows of them is `models.projector`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgvq_kernels import ops
from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.layers.rope import VisionRope
from mgvq_runtime.models.config import VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations a vision tower may ask for, by Hugging Face's name."""


class PatchEmbed(nn.Module):
    """A strided convolution over non-overlapping patches, as one matrix product."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.proj = factory.linear(f"{name}.proj", config.patch_dim, config.embed_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Return `[P, E]` for flattened patches `[P, C*T*p*p]`."""
        return self.proj(patches)


class VisionAttention(nn.Module):
    """Full attention within each frame, with 2-D rope; q, k, v in one matrix."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__()
        E = config.embed_dim
        self.num_heads, self.head_dim = config.num_heads, E // config.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = factory.linear(f"{name}.qkv", E, 3 * E, bias=True)
        self.proj = factory.linear(f"{name}.proj", E, E, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
        """Return `[P, E]` for `x [P, E]` and angles `[P, Dh]` float32."""
        P = x.shape[0]
        qkv = self.qkv(x).view(P, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(1)  # [P, H, Dh] each
        q, k = ops.rope(q, k, cos, sin)
        mixed = ops.varlen_attention(q, k, v, cu_seqlens, False, self.scale)
        return self.proj(mixed.reshape(P, -1))


class VisionMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__()
        E, width = config.embed_dim, config.intermediate_size
        self.fc1 = factory.linear(f"{name}.fc1", E, width, bias=True)
        self.fc2 = factory.linear(f"{name}.fc2", width, E, bias=True)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[P, E]` for `[P, E]`."""
        return self.fc2(self.act(self.fc1(x)))


class VisionBlock(nn.Module):
    """One pre-norm block."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, config.layer_norm_eps).requires_grad_(False)
        self.norm2 = nn.LayerNorm(config.embed_dim, config.layer_norm_eps).requires_grad_(False)
        self.attn = VisionAttention(f"{name}.attn", config, factory)
        self.mlp = VisionMLP(f"{name}.mlp", config, factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
        """Return `[P, E]` for `[P, E]`."""
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patch embedding, blocks and the merger; called `visual` in the checkpoint."""

    def __init__(
        self, name: str, config: VisionConfig, merger: nn.Module, factory: LayerFactory
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(f"{name}.patch_embed", config, factory)
        self.rotary_pos_emb = VisionRope(
            config.embed_dim // config.num_heads, config.rope_theta, config.spatial_merge_size
        )
        self.blocks = nn.ModuleList(
            VisionBlock(f"{name}.blocks.{i}", config, factory) for i in range(config.depth)
        )
        self.merger = merger

    def forward(self, patches: Tensor, grid_thw: Sequence[tuple[int, int, int]]) -> Tensor:
        """Return decoder rows `[N, D]` for patches `[P, C*T*p*p]` of images end to end."""
        cos, sin = self.rotary_pos_emb(grid_thw)  # [P, Dh] float32 each
        cu_seqlens = frame_boundaries(grid_thw)
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, cos, sin, cu_seqlens)
        return self.merger(x)


def frame_boundaries(grid_thw: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """Return running sums of patches a frame, from 0 to P: what may attend to what."""
    lengths = [h * w for t, h, w in grid_thw for _ in range(t)]
    return (0, *accumulate(lengths))
