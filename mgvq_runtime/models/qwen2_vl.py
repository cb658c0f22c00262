"""Qwen2-VL: a 2-D rope ViT, a 2x2 patch merger and a Qwen2 decoder with three-axis rope.

The graph only: `models.loading` fills it, `engine` feeds it. Module names are the hub's, with q/k/v
and gate/up fused, so that a checkpoint's tensor names are this module's parameter names.

Source: arXiv 2409.12191; transformers 5.23 `models/qwen2_vl/modeling_qwen2_vl.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mgvq_runtime.layers.embedding import TiedHead
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.config import Qwen2VLConfig
from mgvq_runtime.models.decoder import Decoder
from mgvq_runtime.models.projector import PatchMerger
from mgvq_runtime.models.vision import VisionTower


class Qwen2VL(nn.Module):
    """Qwen2VLForConditionalGeneration, dense or quantized, matrix by matrix."""

    def __init__(self, config: Qwen2VLConfig, factory: LayerFactory | None = None) -> None:
        """Make the graph without weights; under `torch.device("meta")` it takes no memory.

        Args:
            config: Shapes.
            factory: Makes each matrix dense or quantized; None makes all of them dense.

        Raises:
            ValueError: if a layout of the factory has not the shape the config wants.
        """
        super().__init__()
        factory = factory or LayerFactory()
        text, vision = config.text_config, config.vision_config
        self.config = config
        merger = PatchMerger("visual.merger", vision, factory)
        self.visual = VisionTower("visual", vision, merger, factory)
        self.model = Decoder("model", text, factory)
        self.lm_head: nn.Module
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = factory.linear("lm_head", text.hidden_size, text.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations; norms are never quantized, so one of them tells."""
        return self.model.norm.weight.dtype

    def encode_images(self, patches: Tensor, grid_thw: Sequence[tuple[int, int, int]]) -> Tensor:
        """Encode any number of images.

        Args:
            patches: `[P, C*T*p*p]` of any float dtype, images end to end, each in merge order.
            grid_thw: Patches along time, height and width of each image.

        Returns:
            `[N, D]` rows for the placeholders of the images, in order, in the model's dtype.
        """
        return self.visual(patches.to(self.dtype), grid_thw)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return token embeddings `[T, D]` for `[T]` int64; image rows are put in by the caller."""
        return self.model.embed_tokens(input_ids)

    def forward(self, inputs_embeds: Tensor, batch: ForwardBatch) -> Tensor:
        """Return final hidden states `[T, D]`, normalised, ready for `logits`.

        Args:
            inputs_embeds: `[T, D]` token and image embeddings of all requests, end to end.
            batch: Positions, lengths and cache of the requests.
        """
        return self.model(inputs_embeds, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return `[R, V]` float32 for the rows `[R, D]` that need a next token."""
        return self.lm_head(hidden).float()
