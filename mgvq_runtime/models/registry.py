"""Which architectures run, and what makes each of them (called by `models.loading`, `engine`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mgvq_runtime.errors import ConfigError
from mgvq_runtime.models.causal_lm import CausalLM, CausalLMConfig
from mgvq_runtime.models.config import (
    InternVL2Config,
    LlavaOnevisionConfig,
    ModelConfig,
    Qwen2VLConfig,
)
from mgvq_runtime.models.internvl2 import InternVL2
from mgvq_runtime.models.llava_onevision import LlavaOnevision
from mgvq_runtime.models.qwen2_vl import Qwen2VL
from mgvq_runtime.multimodal.processors import ImageProcessor
from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor
from mgvq_runtime.multimodal.processors.llava_onevision import LlavaOnevisionImageProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor


@dataclass(frozen=True)
class Family:
    """The parts of one architecture."""

    name: str
    """What people call it."""
    architecture: str
    """What config.json calls it, under "architectures"."""
    config: type[ModelConfig]
    """Read with `.from_hf(config.json)`."""
    model: Callable[..., CausalLM]
    """Made with `(config, factory)`."""
    image_processor: type[ImageProcessor] | None
    """Read with `.from_folder(path)`; None for a model that reads text alone."""
    max_image_tokens: int | None = None
    """Most tokens one picture may take where nobody says; less than the hub's files allow."""


TEXT_ONLY = (
    "Qwen2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "InternLM2ForCausalLM",
    "Phi3ForCausalLM",
)
"""Decoders without a vision tower; their model_type says which is which."""

FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        *(Family("text alone", name, CausalLMConfig, CausalLM, None) for name in TEXT_ONLY),
        Family(
            "Qwen2-VL",
            "Qwen2VLForConditionalGeneration",
            Qwen2VLConfig,
            Qwen2VL,
            Qwen2VLImageProcessor,
            max_image_tokens=1280,
        ),
        *(
            Family(
                "LLaVA-OneVision",
                name,
                LlavaOnevisionConfig,
                LlavaOnevision,
                LlavaOnevisionImageProcessor,
                max_image_tokens=3753,  # every canvas of up to four tiles
            )
            for name in ("LlavaOnevisionForConditionalGeneration", "LlavaQwenForCausalLM")
        ),
        *(
            Family(
                "InternVL2",
                name,
                InternVL2Config,
                InternVL2,
                InternVL2ImageProcessor,
                max_image_tokens=1792,  # six tiles and the thumbnail
            )
            for name in ("InternVLChatModel", "InternVLForConditionalGeneration")
        ),
    )
}
"""Every family this release runs, by the architecture string of config.json."""


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family that a parsed config.json names.

    Raises:
        ConfigError: if it names none, or one that is not known; the known ones are listed.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigError(
            f"config.json: architectures must be a list with one name, got {names!r}; "
            f"known: {', '.join(FAMILIES)}"
        )
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    raise ConfigError(
        f"config.json: architecture {names[0]!r} is not supported; known: {', '.join(FAMILIES)}"
    )


def meta_graph(family: Family, *parts: Any) -> CausalLM:
    """Make a graph without weights, which takes no memory whatever its size.

    Args:
        family: From `find_family`.
        parts: What `Family.model` is made with: the config, and perhaps a factory.

    Raises:
        ConfigError: if a tensor would be larger than any can be.
    """
    try:
        with torch.device("meta"):
            return family.model(*parts)
    except RuntimeError as error:
        raise ConfigError(
            f"config.json: no {family.name} model of these sizes can be made: {error}; look for a "
            "number that is far too large"
        ) from error
