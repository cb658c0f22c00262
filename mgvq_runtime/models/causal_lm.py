"""A decoder with its output head: a text-only model, and what every family with pictures extends.

The graph only: `models.loading` fills it, `engine` feeds it. Module names are Qwen2's and Llama's
on the hub, with q/k/v and gate/up fused, so that a checkpoint's tensor names are this module's
parameter names whatever the folder they came from called them. A vision tower is `visual`, and what
makes decoder rows of its output `visual.merger`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mgvq_runtime.layers.embedding import HostEmbedding, TiedHead
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.models.decoder import Decoder
from mgvq_runtime.models.decoder_config import decoder_from_hf
from mgvq_runtime.models.vision import VisionTower
from mgvq_runtime.request import Layout


@dataclass(frozen=True)
class CausalLMConfig(ModelConfig):
    """A text-only model."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json; its model_type says which decoder it is.

        Raises:
            ConfigError: if a key is missing, of the wrong type or inconsistent with another, or
                asks for something that is not implemented; the message names the key.
        """
        fields = Fields(config, "")
        tied = fields.boolean("tie_word_embeddings", default=False)
        return cls(decoder_from_hf(fields), None, None, tied)


class CausalLM(nn.Module):
    """`LlamaForCausalLM` and its kin, dense or quantized, matrix by matrix."""

    def __init__(
        self,
        config: ModelConfig,
        factory: LayerFactory | None = None,
        visual: VisionTower | None = None,
    ) -> None:
        """Make the graph without weights; under `torch.device("meta")` it takes no memory.

        Args:
            config: Shapes.
            factory: Makes each matrix dense or quantized; None makes all of them dense.
            visual: A family's vision tower with its merger; None for a model of text alone.

        Raises:
            ValueError: if a layout of the factory has not the shape the config wants.
        """
        super().__init__()
        self.config = config
        factory = factory or LayerFactory()
        text = config.text_config
        self.visual = visual
        self.model = Decoder("model", text, factory)
        self.lm_head: nn.Module
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = factory.head("lm_head", text.hidden_size, text.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations; norms are never quantized, so one of them tells."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.norm.weight.device

    @property
    def ids_device(self) -> torch.device:
        """Where `embed` takes token ids: a table in main memory is read by the CPU."""
        is_on_host = isinstance(self.model.embed_tokens, HostEmbedding)
        return torch.device("cpu") if is_on_host else self.device

    def set_context_length(self, num_tokens: int) -> None:
        """Say how long contexts will get, before the first forward; see `Decoder`."""
        self.model.set_context_length(num_tokens)

    def encode_images(
        self,
        patches: Tensor,
        grid_thw: Sequence[tuple[int, int, int]],
        layouts: Sequence[Layout | None] = (),
        max_patches: int | None = None,
    ) -> Tensor:
        """Encode any number of images.

        Args:
            patches: `[P, C*T*p*p]` of any float dtype, images end to end, each in the order its
                family's image processor gives.
            grid_thw: Frames or tiles of each image, and patches along height and width of one.
            layouts: What each image's tiles or frames become, for the families that rearrange them.
            max_patches: Most that go through the tower at once; None takes all together.

        Returns:
            `[N, D]` rows for the placeholders of the images, in order, in the model's dtype.
        """
        assert self.visual is not None, "a model without a vision tower takes no pictures"
        return self.visual(patches.to(self.dtype), grid_thw, max_patches)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return token embeddings `[T, D]`; rows of pictures are put in by the caller.

        Args:
            input_ids: `[T]` int64 on `ids_device`.
        """
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
