"""InternVL2: InternViT, pixel shuffle with a two-layer projector, and a decoder of any kind.

Every tile of a picture gives the same number of decoder rows, tile after tile.

Source: arXiv 2404.16821; OpenGVLab/InternVL2-2B `modeling_internvl_chat.py`; transformers 5.24
`models/internvl/modeling_internvl.py`.
"""

from __future__ import annotations

from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import InternVL2Config
from mgvq_runtime.models.projector import PixelShuffleProjector
from mgvq_runtime.models.vision import VisionTower


class InternVL2(CausalLM):
    """InternVLChatModel, and transformers' InternVLForConditionalGeneration."""

    def __init__(self, config: InternVL2Config, factory: LayerFactory | None = None) -> None:
        """Make the graph without weights; see `CausalLM`."""
        factory = factory or LayerFactory()
        vision = config.vision_config
        merger = PixelShuffleProjector("visual.merger", vision, factory)
        super().__init__(config, factory, VisionTower("visual", vision, merger, factory))
