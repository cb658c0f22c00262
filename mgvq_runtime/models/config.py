"""Shapes of the graph, read from a Hugging Face config.json (called by `models.loading`).

One frozen dataclass a part; only `from_hf` knows the file's spellings, the hub's flat one and the
nested one of transformers 5. What would change an answer and is not implemented is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgvq_runtime.errors import ConfigError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.models.decoder_config import DecoderConfig, decoder_from_hf

VISION_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
"""Activations of the vision tower that `models.vision` implements."""

_VISION_ROPE_TYPES = ("default", "axial")


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower and of its merger."""

    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    hidden_size: int
    """Width of the merger's output: the decoder's hidden size."""
    hidden_act: str
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Qwen2VLConfig:
    """A whole Qwen2-VL model."""

    text_config: DecoderConfig
    vision_config: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2VLConfig:
        """Read a config.json, flat as on the hub or nested as transformers 5 writes it.

        Args:
            config: The parsed file. Keys that do not touch the arithmetic are ignored.

        Raises:
            ConfigError: if a key is missing, of the wrong type or inconsistent with another, or
                asks for something that is not implemented; the message names the key.
        """
        top = Fields(config, "")
        nested = top.mapping("text_config", default={})
        text_fields = Fields(nested, "text_config.") if nested else top
        text = decoder_from_hf(text_fields)
        vision = _vision_from_hf(Fields(top.mapping("vision_config"), "vision_config."), text)
        ids = {
            "image_token_id": top.integer("image_token_id", default=151655, low=0),
            "video_token_id": top.integer("video_token_id", default=151656, low=0),
            "vision_start_token_id": top.integer("vision_start_token_id", default=151652, low=0),
            "vision_end_token_id": top.integer("vision_end_token_id", default=151653, low=0),
        }
        if ids["image_token_id"] >= text.vocab_size:
            raise ConfigError(
                f"config.json: image_token_id {ids['image_token_id']} is outside the vocabulary "
                f"of {text.vocab_size}"
            )
        tied = top.boolean("tie_word_embeddings", default=False)
        tied = tied or text_fields.boolean("tie_word_embeddings", default=False)
        return cls(text, vision, tie_word_embeddings=tied, **ids)


def _vision_from_hf(fields: Fields, text: DecoderConfig) -> VisionConfig:
    """Read the vision part; the hub leaves out what is Qwen2-VL's default."""
    embed_dim = fields.integer("embed_dim", default=1280)
    num_heads = fields.integer("num_heads", default=16)
    fields.divides("4 * num_heads", 4 * num_heads, "embed_dim", embed_dim)
    hidden_size = fields.integer("hidden_size", default=text.hidden_size)
    if hidden_size != text.hidden_size:
        fields.refuse("hidden_size", hidden_size, f"the decoder's {text.hidden_size}")
    channels_key = "in_channels" if fields.has("in_channels") else "in_chans"
    in_channels = fields.integer(channels_key, default=3)
    if in_channels != 3:
        fields.refuse(channels_key, in_channels, "3: pictures are RGB")
    rope = Fields(fields.mapping("rope_parameters", default={}), f"{fields.prefix}rope_parameters.")
    rope.one_of("rope_type", _VISION_ROPE_TYPES, default="axial")
    return VisionConfig(
        depth=fields.integer("depth", default=32),
        embed_dim=embed_dim,
        num_heads=num_heads,
        intermediate_size=int(embed_dim * fields.number("mlp_ratio", default=4)),
        hidden_size=hidden_size,
        hidden_act=fields.one_of("hidden_act", VISION_ACTIVATIONS, default="quick_gelu"),
        in_channels=in_channels,
        patch_size=fields.square("patch_size", default=14),
        temporal_patch_size=fields.square("temporal_patch_size", default=2),
        spatial_merge_size=fields.integer("spatial_merge_size", default=2),
        rope_theta=rope.number("rope_theta", default=10000.0),
    )
