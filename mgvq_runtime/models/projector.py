"""From vision rows to decoder rows (the `merger` of `models.vision`, chosen by the family)."""

from __future__ import annotations

from torch import Tensor, nn

from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.vision_config import VisionConfig


class PatchMerger(nn.Module):
    """Norm, four neighbouring patches side by side, two linear layers: Qwen2-VL's projector."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, config.layer_norm_eps).requires_grad_(False)
        self.mlp = nn.Sequential(
            factory.linear(f"{name}.mlp.0", self.width, self.width, bias=True),
            nn.GELU(),
            factory.linear(f"{name}.mlp.2", self.width, config.hidden_size, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[P / merge**2, D]` for `[P, E]` in block-major merge order."""
        return self.mlp(self.ln_q(x).view(-1, self.width))


class MLPProjector(nn.Sequential):
    """Two linear layers around GELU, a row a patch: LLaVA's `mlp2x_gelu`."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__(
            factory.linear(f"{name}.0", config.embed_dim, config.hidden_size, bias=True),
            nn.GELU(),
            factory.linear(f"{name}.2", config.hidden_size, config.hidden_size, bias=True),
        )


class PixelShuffleProjector(nn.Sequential):
    """Four neighbouring patches side by side, norm, two linear layers: InternVL2's `mlp1`."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        width = config.embed_dim * config.spatial_merge_size**2
        super().__init__(
            nn.LayerNorm(width).requires_grad_(False),
            factory.linear(f"{name}.1", width, config.hidden_size, bias=True),
            nn.GELU(),
            factory.linear(f"{name}.3", config.hidden_size, config.hidden_size, bias=True),
        )
        self.side, self.merge = config.grid_size, config.spatial_merge_size

    def forward(self, x: Tensor) -> Tensor:
        """Return `[tiles * side**2 / merge**2, D]` for `[tiles * (1 + side**2), E]`.

        The first row of each tile is the class token's and is dropped. The four patches that become
        one row stand in the order (r0c0, r0c1, r1c0, r1c1): pixel shuffle "v2".
        """
        E, n, m = x.shape[-1], self.side, self.merge
        x = x.view(-1, 1 + n * n, E)[:, 1:]  # [tiles, n * n, E]
        x = x.reshape(-1, n // m, m, n // m, m, E).transpose(2, 3)  # [tiles, n/m, n/m, m, m, E]
        x = x.reshape(-1, m * m * E)  # [N, 4 E]
        for module in self:
            x = module(x)
        return x
