"""From vision rows to decoder rows (used by `models.vision`, chosen by the family)."""

from __future__ import annotations

from torch import Tensor, nn

from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.config import VisionConfig


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
