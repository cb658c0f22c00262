"""LLaVA-OneVision: SigLIP without its last norm, a two-layer projector and a Qwen2 decoder.

The tiles of a picture are encoded one by one and put together again: padding is cut off, a large
picture is shrunk, a learned row ends each line, and the whole picture's own tile goes first. The
frames of a video are halved in height and width, and the learned row ends the last.

Source: arXiv 2408.03326; transformers 5.24 `models/llava_onevision/modeling_llava_onevision.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import LlavaOnevisionConfig
from mgvq_runtime.models.projector import MLPProjector
from mgvq_runtime.models.vision import VisionTower
from mgvq_runtime.models.vision_config import VisionConfig
from mgvq_runtime.request import FrameLayout, Layout


class LlavaOnevision(CausalLM):
    """LlavaOnevisionForConditionalGeneration, and lmms-lab's LlavaQwenForCausalLM."""

    def __init__(self, config: LlavaOnevisionConfig, factory: LayerFactory | None = None) -> None:
        """Make the graph without weights; see `CausalLM`."""
        factory = factory or LayerFactory()
        super().__init__(config, factory, AnyresTower("visual", config.vision_config, factory))

    def encode_images(
        self,
        patches: Tensor,
        grid_thw: Sequence[tuple[int, int, int]],
        layouts: Sequence[Layout | None] = (),
        max_patches: int | None = None,
    ) -> Tensor:
        """Encode any number of images; see `CausalLM`. One without a layout is left in a row."""
        assert isinstance(self.visual, AnyresTower)
        features = self.visual(patches.to(self.dtype), grid_thw, max_patches)  # [P, D]
        lengths = [t * h * w for t, h, w in grid_thw]
        layouts = layouts or [None] * len(lengths)
        parts = zip(features.split(lengths), layouts, strict=True)
        return torch.cat([self.visual.pack(part, layout) for part, layout in parts])


class AnyresTower(VisionTower):
    """SigLIP, the projector, and the learned row that ends a line of patches."""

    def __init__(self, name: str, config: VisionConfig, factory: LayerFactory) -> None:
        super().__init__(name, config, MLPProjector(f"{name}.merger", config, factory), factory)
        self.side = config.grid_size
        self.image_newline = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)

    def pack(self, features: Tensor, layout: Layout | None) -> Tensor:
        """Put the tiles of one picture, or the frames of one video, together.

        Args:
            features: `[tiles * side**2, D]`, row-major within each tile.
            layout: Where the tiles lie or what is kept of frames; None leaves all in one line.

        Returns:
            `[N, D]`.
        """
        side, D = self.side, features.shape[-1]
        if layout is None:
            return torch.cat((features, self.image_newline[None]))
        if isinstance(layout, FrameLayout):
            frames = features.view(-1, side, side, D).permute(0, 3, 1, 2)  # [F, D, side, side]
            frames = F.interpolate(frames, (layout.side, layout.side), mode="bilinear")
            rows = frames.permute(0, 2, 3, 1).reshape(-1, D)  # [F * layout.side**2, D]
            return torch.cat((rows, self.image_newline[None]))
        whole, tiles = features[: side * side], features[side * side :]
        grid = tiles.view(layout.rows, layout.columns, side, side, D).transpose(1, 2)
        grid = grid.reshape(layout.rows * side, layout.columns * side, D)
        height, width = layout.kept
        top, left = (grid.shape[0] - height) // 2, (grid.shape[1] - width) // 2
        grid = grid[top : top + height, left : left + width]  # [height, width, D]
        if layout.shrunk != layout.kept:
            image = grid.permute(2, 0, 1)[None]  # [1, D, height, width]
            grid = F.interpolate(image, layout.shrunk, mode="bilinear")[0].permute(1, 2, 0)
        ends = self.image_newline.expand(len(grid), 1, D)
        return torch.cat((whole, torch.cat((grid, ends), dim=1).flatten(0, 1)))
