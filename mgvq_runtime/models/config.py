"""Shapes of whole models, read from a Hugging Face config.json (called by `models.loading`).

One frozen dataclass a family; only its `from_hf` knows the file's spellings, the hub's and those of
transformers 5. What would change an answer and is not implemented is refused by name. The parts are
in `decoder_config` and `vision_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mgvq_runtime.models.config_fields import Fields
from mgvq_runtime.models.decoder_config import DecoderConfig, decoder_from_hf
from mgvq_runtime.models.vision_config import (
    VisionConfig,
    intern_vit_from_hf,
    qwen2_vl_vision_from_hf,
    siglip_from_hf,
)
from mgvq_runtime.request import FrameLayout, ImageInput


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: a decoder, and a vision tower where it takes pictures."""

    text_config: DecoderConfig
    vision_config: VisionConfig | None
    """None for a model that reads text alone."""
    image_token_id: int | None
    """The placeholder that pictures are put in place of; None without a vision tower."""
    tie_word_embeddings: bool
    video_token_id: int | None = None
    """The placeholder of videos; None where they have none, or are shown as pictures."""

    has_grid_positions: ClassVar[bool] = False
    """Whether a picture's tokens have a row and a column position, instead of counting up."""
    shows_frames: ClassVar[bool] = False
    """Whether a video is shown as pictures in numbered lines, one a frame."""

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

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """The tokens that pictures and videos are put in place of; in one family they are one."""
        ids = dict.fromkeys((self.image_token_id, self.video_token_id))
        return tuple(token for token in ids if token is not None)

    def num_image_tokens(self, image: ImageInput) -> int:
        """Return how many placeholders a picture's patches make."""
        assert self.vision_config is not None, "this model takes no pictures"
        t, h, w = image.grid_thw
        return t * h * w // self.vision_config.spatial_merge_size**2


@dataclass(frozen=True)
class Qwen2VLConfig(ModelConfig):
    """A whole Qwen2-VL model."""

    vision_config: VisionConfig

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
        image, video = _placeholder(top, "image", 151655), _placeholder(top, "video", 151656)
        return cls(text, vision, image, _is_tied(top, text_fields), video)


@dataclass(frozen=True)
class LlavaOnevisionConfig(ModelConfig):
    """A whole LLaVA-OneVision model."""

    vision_config: VisionConfig

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json, nested as transformers writes it or flat as lmms-lab's."""
        top = Fields(config, "")
        if top.has("text_config"):
            text_fields = Fields(top.mapping("text_config"), "text_config.")
            text_fields.one_of("model_type", ("qwen2",), default="qwen2")
            top.one_of("projector_hidden_act", ("gelu",), default="gelu")
            top.one_of("vision_feature_select_strategy", ("full",), default="full")
            if not top.boolean("multimodal_projector_bias", default=True):
                top.refuse("multimodal_projector_bias", False, "true")
        else:
            text_fields = top
            _check_lmms_lab(top)
        image = _placeholder(top, "image", 151646)
        video = _placeholder(top, "video", 151647)
        if text_fields is top:  # lmms-lab puts videos behind the placeholder of pictures
            video = image if _takes_videos(top) else None
        text = decoder_from_hf(text_fields, "qwen2")
        vision_fields = Fields(top.mapping("vision_config", default={}), "vision_config.")
        last = top.values.get("vision_feature_layer", -1)
        if last not in (-1, -2):
            top.refuse("vision_feature_layer", last, "-1 or -2: one of the last two layers")
        vision = siglip_from_hf(vision_fields, text.hidden_size, last)
        return cls(text, vision, image, _is_tied(top, text_fields), video)

    def num_image_tokens(self, image: ImageInput) -> int:
        """Return how many placeholders a picture's patches make."""
        t, h, w = image.grid_thw
        if image.layout is None:
            return t * h * w + 1
        if isinstance(image.layout, FrameLayout):
            return t * image.layout.side**2 + 1
        height, width = image.layout.shrunk
        return h * w + height * (width + 1)


@dataclass(frozen=True)
class InternVL2Config(ModelConfig):
    """A whole InternVL2 model; the hub's config.json leaves its placeholder to the tokenizer."""

    vision_config: VisionConfig

    shows_frames: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json, the hub's (`llm_config`) or transformers' (`text_config`)."""
        top = Fields(config, "")
        is_hub = top.has("llm_config")
        key = "llm_config" if is_hub else "text_config"
        text_fields = Fields(top.mapping(key), f"{key}.")
        text = decoder_from_hf(text_fields)
        ratio = top.number("downsample_ratio", default=0.5)
        if 1 / ratio not in (1.0, 2.0, 4.0):
            top.refuse("downsample_ratio", ratio, "1, 0.5 or 0.25")
        vision_fields = Fields(top.mapping("vision_config"), "vision_config.")
        vision = intern_vit_from_hf(vision_fields, text.hidden_size, round(1 / ratio), is_hub)
        layer_key = "select_layer" if is_hub else "vision_feature_layer"
        if top.values.get(layer_key, -1) != -1:
            top.refuse(layer_key, top.values[layer_key], "-1: the last layer")
        if is_hub:
            top.one_of("ps_version", ("v2",), default="v1")
            # The hub's own code ignores what llm_config says of it: heads are never tied.
            tied = top.boolean("tie_word_embeddings", default=False)
            token = _placeholder(top, "image", None)
        else:
            top.one_of("vision_feature_select_strategy", ("default",), default="default")
            top.one_of("projector_hidden_act", ("gelu",), default="gelu")
            # transformers 4 writes the key into text_config alone.
            key = "tie_word_embeddings"
            tied = top.boolean(key, default=text_fields.boolean(key, default=True))
            token = _placeholder(top, "image", 151667)
        return cls(text, vision, token, tied)


def _placeholder(fields: Fields, kind: str, default: int | None) -> int | None:
    """Read the placeholder of pictures or videos; None where neither file nor default has one.

    Whether it is a token of the decoder is seen when the tensors are (`models.loading`).
    """
    key = f"{kind}_token_id" if fields.has(f"{kind}_token_id") else f"{kind}_token_index"
    return fields.integer(key, low=0) if fields.has(key) else default


def _is_tied(top: Fields, text: Fields) -> bool:
    """Return whether the head is the token table; transformers 5 says so beside the decoder."""
    return top.boolean("tie_word_embeddings", default=False) or text.boolean(
        "tie_word_embeddings", default=False
    )


_LMMS_LAB = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_vision_select_feature": ("patch",),
}
"""What lmms-lab's files may say of LLaVA-OneVision; the first is what a missing key stands for."""

_LMMS_LAB_VIDEOS = {
    "mm_newline_position": "one_token",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
}
"""What a missing key says of videos. Nothing else is implemented: such a model takes no videos."""


def _check_lmms_lab(top: Fields) -> None:
    """Refuse a folder in lmms-lab's format that is another model than LLaVA-OneVision."""
    tower = top.values.get("mm_vision_tower") or "google/siglip-so400m-patch14-384"
    if "siglip-so400m-patch14-384" not in str(tower):
        top.refuse("mm_vision_tower", tower, "google/siglip-so400m-patch14-384")
    for key, known in _LMMS_LAB.items():
        top.one_of(key, known, default=known[0])


def _takes_videos(top: Fields) -> bool:
    """Return whether lmms-lab's file wants videos as LLaVA-OneVision has them."""
    return all(top.values.get(key) in (None, value) for key, value in _LMMS_LAB_VIDEOS.items())
