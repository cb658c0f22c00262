"""The vision tower: one pre-norm ViT, shaped by `VisionConfig` (used by families).

In: flattened patches of any number of images, end to end. Out: decoder rows. Patches attend within
their own frame or tile only, so a long video can run a few frames at a time. What makes decoder
rows of the last block's output is `models.projector`.
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
from mgvq_runtime.layers.norm import RMSNorm
from mgvq_runtime.layers.rope import VisionRope
from mgvq_runtime.models.vision_config import VisionConfig


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
        self.proj = factory.linear(
            f"{name}.proj", config.patch_dim, config.embed_dim, bias=config.patch_bias
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Return `[P, E]` for flattened patches `[P, C*T*p*p]`."""
        return self.proj(patches)


class VisionAttention(nn.Module):
    """Full attention within each frame, with 2-D rope where there is one; q, k, v in one matrix."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__()
        E = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = E // config.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = factory.linear(f"{name}.qkv", E, 3 * E, bias=config.qkv_bias)
        self.proj = factory.linear(f"{name}.proj", E, E, bias=True)
        self.q_norm = RMSNorm(E, config.layer_norm_eps) if config.has_qk_norm else None
        self.k_norm = RMSNorm(E, config.layer_norm_eps) if config.has_qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: tuple[int, ...]
    ) -> Tensor:
        """Return `[P, E]` for `x [P, E]` and angles `[P, Dh]` float32, None without rope."""
        P = x.shape[0]
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [P, E] each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (q, k, v))
        if cos is not None and sin is not None:
            q, k = ops.rope(q, k, cos, sin)
        mixed = ops.varlen_attention(q, k, v, cu_seqlens, False, self.scale)  # [P, H, Dh]
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
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = VisionAttention(f"{name}.attn", config, factory)
        self.mlp = VisionMLP(f"{name}.mlp", config, factory)
        self.ls1 = _vector(config.embed_dim) if config.has_layer_scale else None
        self.ls2 = _vector(config.embed_dim) if config.has_layer_scale else None

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cu_seqlens: tuple[int, ...]
    ) -> Tensor:
        """Return `[P, E]` for `[P, E]`."""
        mixed = self.attn(self.norm1(x), cos, sin, cu_seqlens)
        x = x + (mixed if self.ls1 is None else mixed * self.ls1)
        out = self.mlp(self.norm2(x))
        return x + (out if self.ls2 is None else out * self.ls2)


class VisionTower(nn.Module):
    """Patch embedding, blocks and the merger; called `visual` in the checkpoint."""

    def __init__(
        self, name: str, config: VisionConfig, merger: nn.Module, factory: LayerFactory
    ) -> None:
        super().__init__()
        E = config.embed_dim
        self.patch_embed = PatchEmbed(f"{name}.patch_embed", config, factory)
        self.rotary_pos_emb: VisionRope | None = None
        self.class_embedding: nn.Parameter | None = None
        self.position_embedding: nn.Parameter | None = None
        if config.rope_theta is not None:
            self.rotary_pos_emb = VisionRope(
                E // config.num_heads, config.rope_theta, config.spatial_merge_size
            )
        else:
            self.class_embedding = _vector(E) if config.has_class_token else None
            num_positions = config.grid_size**2 + config.has_class_token
            self.position_embedding = _vector(num_positions, E)
        self.blocks = nn.ModuleList(
            VisionBlock(f"{name}.blocks.{i}", config, factory) for i in range(config.depth)
        )
        self.merger = merger

    def forward(
        self,
        patches: Tensor,
        grid_thw: Sequence[tuple[int, int, int]],
        max_patches: int | None = None,
    ) -> Tensor:
        """Return decoder rows `[N, D]` for patches `[P, C*T*p*p]` of images end to end.

        At most `max_patches` go through the tower at once, one frame at least; None takes all.
        """
        runs = [grid_thw] if max_patches is None else frame_runs(grid_thw, max_patches)
        parts = torch.split(patches, [sum(t * h * w for t, h, w in run) for run in runs])
        rows = [self._encode(part, run) for part, run in zip(parts, runs, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _encode(self, patches: Tensor, grid_thw: Sequence[tuple[int, int, int]]) -> Tensor:
        cos, sin = None, None
        cu_seqlens = frame_boundaries(grid_thw)
        x = self.patch_embed(patches)  # [P, E]
        if self.rotary_pos_emb is not None:
            cos, sin = self.rotary_pos_emb(grid_thw)  # [P, Dh] float32 each
        else:
            x, cu_seqlens = self._with_positions(x)
        for block in self.blocks:
            x = block(x, cos, sin, cu_seqlens)
        return self.merger(x)

    def _with_positions(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Add class token and positions to `[P, E]` of whole tiles; return tile boundaries too."""
        assert self.position_embedding is not None, "a tower has rope or learned positions"
        length = len(self.position_embedding)
        if self.class_embedding is None:
            x = x.view(-1, length, x.shape[-1])  # [tiles, N, E]
        else:
            x = x.view(-1, length - 1, x.shape[-1])
            first = self.class_embedding.expand(len(x), 1, -1)
            x = torch.cat((first, x), dim=1)  # [tiles, 1 + N, E]
        x = (x + self.position_embedding).flatten(0, 1)
        return x, tuple(range(0, len(x) + 1, length))


def frame_runs(
    grid_thw: Sequence[tuple[int, int, int]], max_patches: int
) -> Sequence[Sequence[tuple[int, int, int]]]:
    """Cut images, long ones between their frames, into runs of so many patches or one frame.

    Returns:
        Grids of the runs, which together are those of the images.
    """
    runs: list[list[tuple[int, int, int]]] = [[]]
    room = max_patches
    for t, h, w in grid_thw:
        while t:
            if h * w > room and runs[-1]:
                runs.append([])
                room = max_patches
            fitting = min(t, max(1, room // (h * w)))
            runs[-1].append((fitting, h, w))
            t, room = t - fitting, room - fitting * h * w
    return runs


def frame_boundaries(grid_thw: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    """Return running sums of patches a frame, from 0 to P: what may attend to what."""
    lengths = [h * w for t, h, w in grid_thw for _ in range(t)]
    return (0, *accumulate(lengths))


def _norm(config: VisionConfig) -> nn.Module:
    """Make one norm of a block."""
    if config.norm == "rms_norm":
        return RMSNorm(config.embed_dim, config.layer_norm_eps)
    return nn.LayerNorm(config.embed_dim, config.layer_norm_eps).requires_grad_(False)


def _vector(*shape: int) -> nn.Parameter:
    """Make a learned vector or table, not filled yet."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)
