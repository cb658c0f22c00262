"""Qwen2-VL: a 2-D rope ViT, a 2x2 patch merger and a Qwen2 decoder with three-axis rope.

Source: arXiv 2409.12191; transformers 5.24 `models/qwen2_vl/modeling_qwen2_vl.py`.
"""

from __future__ import annotations

from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import Qwen2VLConfig
from mgvq_runtime.models.projector import PatchMerger
from mgvq_runtime.models.vision import VisionTower


class Qwen2VL(CausalLM):
    """Qwen2VLForConditionalGeneration, dense or quantized, matrix by matrix."""

    def __init__(self, config: Qwen2VLConfig, factory: LayerFactory | None = None) -> None:
        """Make the graph without weights; as `CausalLM`."""
        factory = factory or LayerFactory()
        vision = config.vision_config
        merger = PatchMerger("visual.merger", vision, factory)
        super().__init__(config, factory, visual=VisionTower("visual", vision, merger, factory))
