"""Tiny LLaVA-OneVision and InternVL2 models with random weights, in every published spelling.

The reference is transformers' model; other dialects are its tensors after the published mapping
of names (transformers' `convert_llava_onevision_weights_to_hf.py` and
`convert_internvl_weights_to_hf.py`, read backwards), written out here one by one.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.runtime.conftest import write_json
from tests.runtime.models.decoders import internlm2_tensors

IMAGE = 470
TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 60,  # 4 patches a side, and a rest of 4 pixels as 384 has one of 6
    "vision_use_head": False,
}
PINPOINTS = [[60 * rows, 60 * columns] for rows in range(1, 7) for columns in range(1, 7)]
INTERN_VIT: dict[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": [14, 14],
    "image_size": [56, 56],
    "attention_bias": True,
}
INTERN_VIT_6B = {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}


def llava_config(ids: dict[str, int] | None = None, **text: Any) -> dict[str, Any]:
    """Return transformers' config.json of a tiny LLaVA-OneVision."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **TEXT, **text},
        "vision_config": copy.deepcopy(SIGLIP),
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": (ids or {}).get("<image>", IMAGE),
        "video_token_index": (ids or {}).get("<video>", IMAGE + 1),
        "vision_aspect_ratio": "anyres_max_9",
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


def internvl_config(
    kind: str = "qwen2", vision: dict[str, Any] | None = None, **text: Any
) -> dict[str, Any]:
    """Return transformers' config.json of a tiny InternVL with a decoder of `kind`."""
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": {"model_type": kind, **TEXT, **text},
        "vision_config": {**copy.deepcopy(INTERN_VIT), **(vision or {})},
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
        "image_token_id": IMAGE,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


def reference_model(config: dict[str, Any], seed: int) -> Any:
    """Return transformers' model with seeded random weights, norms, biases and scales included."""
    import transformers

    values = {k: v for k, v in copy.deepcopy(config).items() if k != "architectures"}
    config_class = transformers.AutoConfig.for_model(**values)
    model = getattr(transformers, config["architectures"][0])(config_class).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if ("norm" in name and name.endswith("weight")) or "lambda" in name:
                parameter.copy_(1.0 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "embeddings" in name or "cls_token" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def tensors_of(reference: Any) -> dict[str, Tensor]:
    """Return the tensors in transformers 5's own names, a tied head left out."""
    return {name: p.detach().contiguous() for name, p in reference.named_parameters()}


def renamed(tensors: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """Apply regular expressions to names, one after the other."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = re.sub(old, new, name)
        result[name] = tensor
    return result


def llava_4_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spell LLaVA-OneVision as transformers 4 did."""
    return renamed(
        tensors,
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    )


def lmms_lab_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spell LLaVA-OneVision as lmms-lab does, what is never run included."""
    result = renamed(
        tensors,
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.language_model\.", "model."),
        (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    )
    tower = "model.vision_tower.vision_tower.vision_model."
    result[f"{tower}post_layernorm.weight"] = torch.ones(32)
    result[f"{tower}encoder.layers.26.layer_norm1.weight"] = torch.ones(32)
    return result


def lmms_lab_config(config: dict[str, Any]) -> dict[str, Any]:
    """Spell the config as lmms-lab does; its tower is always so400m, so a tiny one is said too."""
    return {
        **config["text_config"],
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "vision_config": config["vision_config"],
        "image_aspect_ratio": config["vision_aspect_ratio"],
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "image_token_index": config["image_token_index"],
        "mm_hidden_size": 32,
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }


def internvl_4_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spell InternVL as transformers 4 did."""
    return renamed(
        tensors,
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.", ""),
    )


def internvl_hub_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spell InternVL2 as OpenGVLab does; a decoder that says "internlm2" becomes one."""
    fused = {}
    for name, tensor in tensors.items():
        if ".attention.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            fused[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif not re.search(r"\.attention\.[kv]_proj\.", name):
            fused[name] = tensor
    result = renamed(
        fused,
        (r"^model\.vision_tower\.", "vision_model."),
        (r"encoder\.layer\.", "encoder.layers."),
        (r"cls_token$", "class_embedding"),
        (r"position_embeddings$", "position_embedding"),
        (r"patch_embeddings\.projection", "patch_embedding"),
        (r"lambda_", "ls"),
        (r"\.attention\.projection_layer\.", ".attn.proj."),
        (r"(^vision_model.*)\.attention\.", r"\1.attn."),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
        (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
        (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
    if config["llm_config"]["model_type"] != "internlm2":
        return result
    decoder = {n: t for n, t in result.items() if n.startswith("language_model.")}
    others = {n: t for n, t in result.items() if n not in decoder}
    return {**others, **internlm2_tensors(config["llm_config"], decoder)}


def internvl_hub_config(
    config: dict[str, Any], kind: str | None = None, **top: Any
) -> dict[str, Any]:
    """Spell the config as OpenGVLab does, with a decoder of `kind` where it is another."""
    text, vision = dict(config["text_config"]), config["vision_config"]
    if kind is not None:
        text["model_type"] = kind
        text["bias"] = False
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config["downsample_ratio"],
        "dynamic_image_size": True,
        "force_image_size": vision["image_size"][0],
        "llm_config": text,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "Hermes-2",
        "use_thumbnail": True,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_act": "gelu",
            "hidden_size": vision["hidden_size"],
            "image_size": vision["image_size"][0],
            "intermediate_size": vision["intermediate_size"],
            "layer_norm_eps": 1e-6,
            "norm_type": vision.get("norm_type", "layer_norm"),
            "num_attention_heads": vision["num_attention_heads"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": vision["patch_size"][0],
            "qk_normalization": vision.get("use_qk_norm", False),
            "qkv_bias": vision["attention_bias"],
        },
        **top,
    }


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder
