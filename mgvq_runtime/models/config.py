"""Shapes of whole models, read from a Hugging Face config.json (called by `models.loading`).

One frozen dataclass a family; only its `from_hf` knows the file's spellings, the hub's and those of
transformers 5. What would change an answer and is not implemented is refused by name. The parts are
in `decoder_config` and `vision_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mgvq_runtime.errors import ConfigError
from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.models.decoder_config import DecoderConfig, decoder_from_hf
from mgvq_runtime.models.vision_config import VisionConfig, qwen2_vl_vision_from_hf
from mgvq_runtime.request import ImageInput


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: a decoder, and a vision tower where it takes pictures."""

    text_config: DecoderConfig
    vision_config: VisionConfig | None
    """None for a model that reads text alone."""
    image_token_id: int | None
    """The placeholder that pictures are put in place of; None without a vision tower."""
    tie_word_embeddings: bool

    has_grid_positions: ClassVar[bool] = False
    """Whether a picture's tokens have a row and a column position, instead of counting up."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json.

        Args:
            config: The parsed file. Keys that do not touch the arithmetic are ignored.

        Raises:
            ConfigError: if a key is missing, of the wrong type or inconsistent with another, or
                asks for something that is not implemented; the message names the key.
        """
        raise NotImplementedError

    def num_image_tokens(self, image: ImageInput) -> int:
        """Return how many placeholders a picture's patches make."""
        assert self.vision_config is not None, "this model takes no pictures"
        t, h, w = image.grid_thw
        return t * h * w // self.vision_config.spatial_merge_size**2


@dataclass(frozen=True)
class Qwen2VLConfig(ModelConfig):
    """A whole Qwen2-VL model."""

    vision_config: VisionConfig
    image_token_id: int

    has_grid_positions: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json, flat as on the hub or nested as transformers 5 writes it."""
        top = Fields(config, "")
        nested = top.mapping("text_config", default={})
        text_fields = Fields(nested, "text_config.") if nested else top
        text = decoder_from_hf(text_fields, "qwen2_vl")
        vision_fields = Fields(top.mapping("vision_config"), "vision_config.")
        vision = qwen2_vl_vision_from_hf(vision_fields, text.hidden_size)
        tied = top.boolean("tie_word_embeddings", default=False)
        tied = tied or text_fields.boolean("tie_word_embeddings", default=False)
        return cls(text, vision, image_token(top, "image_token_id", 151655, text), tied)


def image_token(fields: Fields, key: str, default: int, text: DecoderConfig) -> int:
    """Read the placeholder of pictures.

    Raises:
        ConfigError: if it is no token of the decoder.
    """
    token = fields.integer(key, default=default, low=0)
    if token >= text.vocab_size:
        raise ConfigError(
            f"config.json: {key} {token} is outside the vocabulary of {text.vocab_size}"
        )
    return token
