"""Reading config.json: both dialects alike, and a loud no to what would change answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mgvq_runtime.errors import ConfigError
from mgvq_runtime.models.config import Qwen2VLConfig
from mgvq_runtime.models.registry import FAMILIES, find_family
from mgvq_runtime.models.sizes import measure
from tests.runtime.conftest import SPECIAL_TOKENS, hub_config

IDS = {token: 480 + i for i, token in enumerate(SPECIAL_TOKENS)}


def changed(**overrides: Any) -> dict[str, Any]:
    config = copy.deepcopy(hub_config(IDS))
    vision = overrides.pop("vision", {})
    config.update(overrides)
    if vision:
        config["vision_config"].update(vision)
    return {key: value for key, value in config.items() if value != "absent"}


def test_hub_2b_config() -> None:
    """The published Qwen2-VL-2B-Instruct, with only what its vision_config says."""
    config = Qwen2VLConfig.from_hf(
        changed(
            hidden_size=1536,
            intermediate_size=8960,
            num_attention_heads=12,
            num_key_value_heads=2,
            num_hidden_layers=28,
            max_position_embeddings=32768,
            sliding_window=32768,
            vocab_size=151936,
            image_token_id=151655,
            rope_theta=1000000.0,
            rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        )
        | {"vision_config": {"hidden_size": 1536, "in_chans": 3, "spatial_patch_size": 14}}
    )
    assert config.text_config.head_dim == 128
    assert config.text_config.rope.mrope_section == (16, 24, 24)
    vision = config.vision_config
    assert (vision.depth, vision.embed_dim, vision.num_heads) == (32, 1280, 16)
    assert (vision.intermediate_size, vision.patch_dim) == (5120, 1176)
    assert (vision.hidden_size, vision.hidden_act) == (1536, "quick_gelu")
    assert config.tie_word_embeddings


def test_flat_and_nested_read_alike() -> None:
    from transformers import Qwen2VLConfig as ReferenceConfig

    flat = hub_config(IDS)
    nested = ReferenceConfig(**copy.deepcopy(flat)).to_dict()
    assert "rope_parameters" in nested["text_config"]
    assert "hidden_size" not in nested
    assert Qwen2VLConfig.from_hf(nested) == Qwen2VLConfig.from_hf(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "absent"}, "config.json: hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be an integer of at least 1, got '64'"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": 66}, r"hidden_size \(66\) is not divisible by num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not divisible"),
        ({"head_dim": 32}, "mrope_section must be sections that sum to head_dim / 2 = 16"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
        ({"rms_norm_eps": "absent"}, "rms_norm_eps is missing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"vision_config": "absent"}, "vision_config is missing"),
        ({"vision_config": 3}, "vision_config must be an object"),
        ({"rope_scaling": "absent"}, "rope_scaling is missing"),
        ({"rope_theta": "absent"}, "rope_theta is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.type must be 'default'"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.mrope_section is missing"),
        ({"rope_scaling": {"mrope_section": [2, 6]}}, "mrope_section must be a list of 3"),
        ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, "sum to head_dim / 2 = 8"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"vision": {"hidden_size": 32}}, "vision_config.hidden_size must be the decoder's 64"),
        ({"vision": {"num_heads": 3}}, r"embed_dim \(32\) is not divisible by 4 \* num_heads"),
        ({"vision": {"hidden_act": "relu"}}, "vision_config.hidden_act must be 'quick_gelu'"),
        ({"vision": {"in_chans": 1}}, "vision_config.in_chans must be 3"),
        ({"vision": {"patch_size": [14, 16]}}, "vision_config.patch_size must be one integer"),
        ({"vision": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_parameters.rope_type"),
        (
            {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
            r"use_sliding_window must be false: sliding windows \(512\)",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types must be full_attention"),
        ({"hidden_size": 2**40}, "hidden_size must be at most 16777216, got 1099511627776"),
        ({"vocab_size": 2**60}, "vocab_size must be at most 16777216"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers must be at most 1000, got 100000000"),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0, got 1000"),
        ({"vision": {"depth": 10**8}}, "vision_config.depth must be at most 1000"),
        ({"vision": {"patch_size": [[14], [14]]}}, "patch_size must be one integer of at least 1"),
        ({"vision": {"patch_size": 2**20}}, "vision_config.patch_size must be at most 8192"),
        ({"vision": {"mlp_ratio": 1e300}}, "vision_config.mlp_ratio must be a number that makes"),
        ({"vision": {"mlp_ratio": 1e-300}}, "vision_config.mlp_ratio must be a number that makes"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Qwen2VLConfig.from_hf(changed(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 0},
        {"sliding_window": None},
        {"num_key_value_heads": None},
        {"vision": {"patch_size": [14, 14], "temporal_patch_size": [2]}},
        {"a_key_of_the_future": 1},
    ],
)
def test_accepted(change: dict[str, Any]) -> None:
    """A window that never bites, lists of one number, keys that touch nothing."""
    Qwen2VLConfig.from_hf(changed(**change))


def test_tied_inside_text_config() -> None:
    config = changed(tie_word_embeddings="absent")
    vision = config.pop("vision_config")
    nested = {"text_config": config, "vision_config": vision, "image_token_id": 486}
    assert not Qwen2VLConfig.from_hf(nested).tie_word_embeddings
    config["tie_word_embeddings"] = True
    assert Qwen2VLConfig.from_hf(nested).tie_word_embeddings


def test_families() -> None:
    assert find_family(changed()).config is Qwen2VLConfig
    assert all(family.architecture == name for name, family in FAMILIES.items())


@pytest.mark.parametrize("architectures", ["absent", [], "Qwen2VL", None])
def test_no_architecture(architectures: Any) -> None:
    with pytest.raises(ConfigError, match="must be a list with one name"):
        find_family(changed(architectures=architectures))


def test_unknown_architecture_lists_the_known() -> None:
    message = "'GPT2LMHeadModel' is not supported; known: .*Qwen2VLForConditionalGeneration"
    with pytest.raises(ConfigError, match=message):
        find_family(changed(architectures=["GPT2LMHeadModel"]))


def test_sizes_that_only_together_are_too_large() -> None:
    config = changed(head_dim=2**23, num_attention_heads=2**22, hidden_size=2**24)
    config["rope_scaling"]["mrope_section"] = [2**22, 0, 0]
    config["vision_config"]["hidden_size"] = 2**24
    with pytest.raises(ConfigError, match="no Qwen2-VL model of these sizes can be made"):
        measure(config)
