"""LLaVA-OneVision's and InternVL2's files: what is refused, missing or misshapen, by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.models.config import InternVL2Config, LlavaOnevisionConfig
from mgvq_runtime.models.loading import load_model
from tests.runtime.models.families import (
    internvl_config,
    internvl_hub_config,
    internvl_hub_tensors,
    llava_4_tensors,
    llava_config,
    lmms_lab_config,
    reference_model,
    tensors_of,
    write_folder,
)
from tests.runtime.models.published import PUBLISHED

Change = dict[str, Any]


def changed(config: dict[str, Any], changes: Change) -> dict[str, Any]:
    """Return a copy with keys set, "vision_config.image_size" inside a part."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, key = path.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[key] = value
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -3}, "vision_feature_layer must be -1 or -2"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer must be -1 or -2"),
        ({"vision_feature_select_strategy": "default"}, "strategy must be 'full'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act must be 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias must be true"),
        ({"text_config.model_type": "llama"}, "text_config.model_type must be 'qwen2', got"),
        ({"image_token_index": -1}, "image_token_index must be an integer of at least 0"),
        ({"vision_config.model_type": "clip_vision_model"}, "model_type must be 'siglip_vis"),
        ({"vision_config.num_attention_heads": 5}, r"hidden_size \(32\) is not divisible by"),
        ({"vision_config.num_channels": 1}, "num_channels must be 3: pictures are RGB"),
        ({"vision_config.hidden_act": "relu"}, "vision_config.hidden_act must be 'quick_gelu'"),
        ({"vision_config.image_size": [60, 62]}, "image_size must be one integer"),
    ],
)
def test_llava_refuses(change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlavaOnevisionConfig.from_hf(changed(llava_config(), change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "must be google/siglip-so400m"),
        ({"mm_projector_type": "linear"}, "mm_projector_type must be 'mlp2x_gelu', got 'linear'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type must be 'spatial_unpad'"),
    ],
)
def test_lmms_lab_refuses(change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlavaOnevisionConfig.from_hf(changed(lmms_lab_config(llava_config()), change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version must be 'v2', got 'v1'"),
        ({"ps_version": None}, "ps_version must be 'v2', got 'v1'"),  # what the hub's code takes
        ({"select_layer": -4}, "select_layer must be -1: the last layer"),
        ({"downsample_ratio": 0.3}, "downsample_ratio must be 1, 0.5 or 0.25"),
        ({"vision_config.norm_type": "batch"}, "norm_type must be 'layer_norm' or 'rms_norm'"),
        ({"vision_config.image_size": 70}, r"image_size \(70\) is not divisible by"),
        ({"llm_config.model_type": "gpt2"}, "llm_config.model_type must be"),
        ({"llm_config": {}}, "llm_config.model_type is missing"),
    ],
)
def test_internvl_refuses(change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InternVL2Config.from_hf(changed(internvl_hub_config(internvl_config()), change))


def test_27_blocks_of_which_the_last_is_left_out() -> None:
    config = changed(PUBLISHED["LLaVA-OneVision-7B"], {"vision_feature_layer": -2})
    config["vision_config"]["num_hidden_layers"] = 27
    expected = LlavaOnevisionConfig.from_hf(PUBLISHED["LLaVA-OneVision-7B"])
    assert LlavaOnevisionConfig.from_hf(config) == expected
    assert expected.vision_config.depth == 26


@pytest.fixture(scope="module")
def llava() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = llava_config()
    return config, llava_4_tensors(tensors_of(reference_model(config, seed=1)))


def test_missing_tensors_are_named_as_the_folder_would(llava: Any, tmp_path: Path) -> None:
    config, tensors = llava
    lost = [
        "vision_tower.vision_model.encoder.layers.1.self_attn.k_proj.bias",
        "multi_modal_projector.linear_2.weight",
        "image_newline",
        "language_model.model.layers.0.mlp.up_proj.weight",
    ]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    with pytest.raises(CheckpointError) as error:
        load_model(write_folder(tmp_path / "a", config, kept))
    assert all(f"missing tensor {name}" in str(error.value) for name in lost)
    assert "LLaVA-OneVision, transformers 4" in str(error.value)


def test_unknown_tensors_are_refused(llava: Any, tmp_path: Path) -> None:
    config, tensors = llava
    extra = {**tensors, "vision_resampler.queries": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="unknown tensor vision_resampler.queries"):
        load_model(write_folder(tmp_path / "a", config, extra))


def test_shapes_must_be_the_configs(tmp_path: Path) -> None:
    config = internvl_config()
    tensors = tensors_of(reference_model(config, seed=1))
    hub = internvl_hub_config(config, image_token_id=3)
    folder = write_folder(tmp_path / "a", hub, internvl_hub_tensors(hub, tensors))
    wrong = changed(hub, {"vision_config.image_size": 84, "vision_config.qk_normalization": True})
    write_folder(tmp_path / "b", wrong, internvl_hub_tensors(hub, tensors))
    assert load_model(folder).visual is not None
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "b")
    problems = "\n".join(error.value.problems)
    assert "visual.position_embedding is [17, 32], expected [37, 32]" in problems
    assert "visual.blocks.1.attn.q_norm.weight [32] is not in the checkpoint" in problems


def test_internvl_of_transformers_4_says_that_heads_are_not_tied_in_text_config(
    tmp_path: Path,
) -> None:
    """The key at the top, left out there, is true by default in transformers 5."""
    config = internvl_config()
    tensors = tensors_of(reference_model(config, seed=1))
    del config["tie_word_embeddings"]
    assert not InternVL2Config.from_hf(config).tie_word_embeddings
    model = load_model(write_folder(tmp_path / "a", config, tensors))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    del config["text_config"]["tie_word_embeddings"]
    assert InternVL2Config.from_hf(config).tie_word_embeddings
    model = load_model(write_folder(tmp_path / "b", config, tensors))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
