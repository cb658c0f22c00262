"""The batched training graph of mgvq-tiny-vl (called by `train` and `evaluate`).

The architecture is Qwen2-VL's and nothing else; parameter names are those of the hub's Qwen2-VL
checkpoints, so a state dict of this module is a checkpoint. What differs from transformers is only
how a batch is laid out: all pictures of a micro-batch have one size (one batched attention in the
tower), and the decoder takes padded rows with block numbers (independent questions on one prefix).
Not here: generation with a cache, files, pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the hub's names where the hub has one."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 768
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    vision_depth: int = 6
    vision_dim: int = 192
    vision_heads: int = 4
    vision_mlp_ratio: int = 4
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def head_dim(self) -> int:
        """Width of one decoder head."""
        return self.hidden_size // self.num_attention_heads


RESIDUAL_OUTPUTS = ("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
"""Matrices that write to the residual stream; they start smaller the deeper the model is."""


def rotate_half(x: Tensor) -> Tensor:
    """Swap the two halves of the last axis and negate the new first one."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `[B, H, L, Dh]` by angles that broadcast to it."""
    return x * cos + rotate_half(x) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain softmax attention over `[B, H, L, Dh]`: the result and the weights `[B, H, L, L]`.

    On a CPU the two batched products are 4-5 times faster, forward and backward, than torch's
    fused kernel at these lengths (bf16, [32, 4, 64, 48]: 6.7 ms against 30.7 ms).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, L, L]
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1)
    return weights @ v, weights


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class VisionBlock(nn.Module):
    """One pre-norm block of the picture tower."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.vision_dim
        self.num_heads = config.vision_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        hidden = D * config.vision_mlp_ratio
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, hidden), "fc2": nn.Linear(hidden, D)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        N, P, D = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(N, P, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [N, H, P, Dh]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        heads, _ = attention(q, k, v)
        x = x + self.attn["proj"](heads.transpose(1, 2).reshape(N, P, D))
        up = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](up * torch.sigmoid(1.702 * up))


class VisionTower(nn.Module):
    """Pictures of one size to one row of hidden states per 2x2 patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, patch = config.vision_dim, config.patch_size
        shape = (D, 3, config.temporal_patch_size, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Module()})
        self.patch_embed["proj"].weight = nn.Parameter(torch.empty(shape))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_depth))
        wide = D * config.spatial_merge_size**2
        mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.hidden_size))
        self.merger = nn.ModuleDict({"ln_q": nn.LayerNorm(D, eps=1e-6), "mlp": mlp})

    def angles(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[P, Dh]` of the 2-D rotary embedding, in merge order."""
        device = self.merger["ln_q"].weight.device
        quarter = self.config.vision_dim // self.config.vision_heads // 4
        steps = torch.arange(quarter, dtype=torch.float32, device=device)
        freq = 10000.0 ** (-steps / quarter)
        merge = self.config.spatial_merge_size
        r = torch.arange(rows, device=device).view(rows, 1).expand(rows, columns)
        c = torch.arange(columns, device=device).view(1, columns).expand(rows, columns)

        def in_merge_order(x: Tensor) -> Tensor:
            blocks = x.reshape(rows // merge, merge, columns // merge, merge)
            return blocks.permute(0, 2, 1, 3).reshape(-1).float()

        angle = torch.cat([torch.outer(in_merge_order(x), freq) for x in (r, c)], dim=-1)
        angle = torch.cat((angle, angle), dim=-1)  # [P, Dh]
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Encode and merge patches: `[N, P, 588]` to `[N, P / 4, D]` rows for the decoder."""
        return self.merge(self.encode(patches, rows, columns))

    def encode(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Run the blocks.

        Args:
            patches: `[N, P, 3 * 14 * 14]` normalised, in merge order, one frame only.
            rows: patch rows of every picture.
            columns: patch columns of every picture.

        Returns:
            `[N, P, vision_dim]` features of the patches.
        """
        weight = self.patch_embed["proj"].weight
        frame_weight = weight.sum(dim=2).flatten(1)  # a still picture fills both frames
        x = patches @ frame_weight.T  # [N, P, D]
        cos, sin = self.angles(rows, columns, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x

    def merge(self, x: Tensor) -> Tensor:
        """One decoder row `[N, P / 4, D]` per 2x2 patches."""
        N, P, D = x.shape
        merged = self.merger["ln_q"](x).view(N, P // 4, 4 * D)
        return self.merger["mlp"](merged)


class RowLayout(NamedTuple):
    """Where the tokens of a batch are: packed for the matrices, in padded rows for attention.

    A quarter of the places are padding, and only an eighth of the tokens predict an answer, so the
    last block goes on with those alone.
    """

    mask: Tensor
    """`[B, 1, L, L]` additive."""
    token_of_place: Tensor
    """`[B * L]` number of the packed token; 0 for padding, which no token sees."""
    place_of_token: Tensor
    """`[T]` number of the place."""
    wanted_tokens: Tensor
    """`[n]` packed tokens whose final state is wanted."""
    wanted_places: Tensor
    """`[n]` their places."""

    @classmethod
    def of(cls, blocks: Tensor, wanted: Tensor, dtype: torch.dtype) -> RowLayout:
        """From `blocks` (see `TinyVLM.forward`) and `wanted`, both `[B, L]`."""
        real = (blocks >= 0).flatten()
        token_of_place = (real.cumsum(0) - 1).clamp(min=0) * real
        wanted_places = wanted.flatten().nonzero().squeeze(-1)
        return cls(
            block_mask(blocks, dtype),
            token_of_place,
            real.nonzero().squeeze(-1),
            token_of_place[wanted_places],
            wanted_places,
        )


class DecoderLayer(nn.Module):
    """One Qwen2 layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.head_dim = config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(D, D),
                "k_proj": nn.Linear(D, kv),
                "v_proj": nn.Linear(D, kv),
                "o_proj": nn.Linear(D, D, bias=False),
            }
        )
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(D, F_, bias=False),
                "up_proj": nn.Linear(D, F_, bias=False),
                "down_proj": nn.Linear(F_, D, bias=False),
            }
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: RowLayout, keep: int, is_last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One block over the real tokens of a batch of padded rows.

        Args:
            x: `[T, D]` hidden states of the tokens that are not padding.
            cos: `[T, 1, Dh]`.
            sin: `[T, 1, Dh]`.
            layout: where the tokens are in the rows, which attention runs over.
            keep: how many first heads' attention to return.
            is_last: whether only the wanted tokens go on.

        Returns:
            `[T, D]`, or the `[n, D]` of the wanted tokens; `[B, keep, L, L]` or None.
        """
        B, _, L, _ = layout.mask.shape
        h = self.input_layernorm(x)
        attn = self.self_attn
        q = apply_rope(attn["q_proj"](h).view(len(x), -1, self.head_dim), cos, sin)
        k = apply_rope(attn["k_proj"](h).view(len(x), -1, self.head_dim), cos, sin)
        v = attn["v_proj"](h).view(len(x), -1, self.head_dim)  # [T, Hk, Dh]
        padded = torch.cat((q, k, v), dim=1)[layout.token_of_place]  # [B * L, H + 2 Hk, Dh]
        padded = padded.view(B, L, -1, self.head_dim).transpose(1, 2)
        q, k, v = padded.split((q.shape[1], k.shape[1], v.shape[1]), dim=1)  # [B, H, L, Dh]
        k = k.repeat_interleave(self.groups, dim=1)
        v = v.repeat_interleave(self.groups, dim=1)
        heads, weights = attention(q, k, v, layout.mask)
        kept = weights[:, :keep] if keep else None
        heads = heads.transpose(1, 2).reshape(B * L, -1)
        if is_last:
            x, heads = x[layout.wanted_tokens], heads[layout.wanted_places]
        else:
            heads = heads[layout.place_of_token]
        x = x + attn["o_proj"](heads)
        h = self.post_attention_layernorm(x)
        mlp = self.mlp
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h)), kept


@dataclass(frozen=True)
class Looking:
    """Which attention weights a forward pass hands out."""

    layers: tuple[int, ...]
    heads: int
    """So many first heads of each of these layers."""


NOT_LOOKING = Looking((), 0)


class TinyVLM(nn.Module):
    """Qwen2-VL with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": layers,
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )

    def initialise(self, seed: int) -> None:
        """Draw all weights anew (normal, residual outputs scaled by depth)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                fan_in = parameter[0].numel()
                std = 0.02 if "embed_tokens" in name else fan_in**-0.5
                vision = name.startswith("visual")
                depth = self.config.vision_depth if vision else self.config.num_hidden_layers
                if name.endswith(RESIDUAL_OUTPUTS):
                    std /= (2 * depth) ** 0.5
                parameter.normal_(0.0, std, generator=generator)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, 1, Dh]` of M-RoPE from positions `[3, T]`."""
        half = self.config.head_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=positions.device)
        freq = self.config.rope_theta ** (-steps / half)
        parts = []
        start = 0
        for axis, width in enumerate(self.config.mrope_section):
            parts.append(positions[axis].float().unsqueeze(-1) * freq[start : start + width])
            start += width
        angle = torch.cat(parts, dim=-1)
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        blocks: Tensor,
        image_mask: Tensor,
        image_rows: Tensor | None,
        wanted: Tensor,
        looking: Looking = NOT_LOOKING,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the decoder over padded rows.

        Args:
            tokens: `[B, L]` ids.
            positions: `[3, B, L]` M-RoPE positions.
            blocks: `[B, L]` 0 in the shared prefix, n in the n-th question, -1 in padding.
            image_mask: `[B, L]` true where a picture's row goes, in reading order.
            image_rows: `[N, P / 4, D]` of all pictures in reading order, or None.
            wanted: `[B, L]` true where the final state is wanted.
            looking: whose attention is wanted.

        Returns:
            Final hidden states `[n, D]` of the wanted tokens, row by row; logits are these times
            the embedding. And for each layer of `looking` the attention `[B, heads, L, L]` of its
            first heads.
        """
        real = blocks >= 0
        x = self.model["embed_tokens"](tokens[real])  # [T, D]
        if image_rows is not None:
            rows = image_rows.flatten(0, 1).to(x.dtype)
            x = x.masked_scatter(image_mask[real].unsqueeze(-1), rows)
        cos, sin = self.angles(positions[:, real], x.dtype)
        layout = RowLayout.of(blocks, wanted, x.dtype)
        seen = []
        layers = self.model["layers"]
        for number, layer in enumerate(layers):
            keep = looking.heads if number in looking.layers else 0
            x, weights = layer(x, cos, sin, layout, keep, number == len(layers) - 1)
            if weights is not None:
                seen.append(weights)
        return self.model["norm"](x), seen

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[..., V]` of hidden states `[..., D]`."""
        return (hidden @ self.model["embed_tokens"].weight.T).float()


def block_mask(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B, 1, L, L]`: causal, own block or shared prefix only."""
    L = blocks.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=blocks.device).tril()
    key, query = blocks.unsqueeze(1), blocks.unsqueeze(2)
    allowed = causal & ((key == query) | (key == 0))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=blocks.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)
