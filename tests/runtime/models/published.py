"""config.json of every published size of the three families, with what touches shapes.

`PARAMETERS` are the totals their publishers give, in millions. Both were taken down without the hub
at hand: a size whose file says otherwise is read as the file says.
"""

from __future__ import annotations

from typing import Any

ONES = [1.0] * 48


def _qwen2(
    hidden: int, layers: int, heads: int, kv: int, width: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": width,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    }


def _qwen2_vl(text: dict[str, Any]) -> dict[str, Any]:
    return {
        **text,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"hidden_size": text["hidden_size"], "in_chans": 3},
    }


def _llava(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "text_config": text,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "image_token_index": 151646,
        "tie_word_embeddings": False,
    }


def _lmms_lab(text: dict[str, Any]) -> dict[str, Any]:
    return {
        **text,
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_9",
        "image_token_index": 151646,
    }


INTERN_VIT_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "image_size": 448,
    "patch_size": 14,
}
INTERN_VIT_6B = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
    "image_size": 448,
    "patch_size": 14,
}


def _internvl(vision: dict[str, Any], template: str, text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": text,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "use_thumbnail": True,
    }


def _plain(
    kind: str, hidden: int, layers: int, heads: int, kv: int, width: int, vocab: int, **more: Any
) -> dict[str, Any]:
    biases = {"internlm2": {"bias": False}, "llama": {"attention_bias": False}}.get(kind, {})
    return {
        **_qwen2(hidden, layers, heads, kv, width, vocab, False),
        "model_type": kind,
        "rms_norm_eps": 1e-5,
        **biases,
        **more,
    }


DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
SU = {
    "rope_scaling": {"type": "su", "short_factor": ONES, "long_factor": ONES},
    "rope_theta": 10000.0,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
}
VIT, BIG_VIT = INTERN_VIT_300M, INTERN_VIT_6B

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B": _qwen2_vl(_qwen2(1536, 28, 12, 2, 8960, 151936, True)),
    "Qwen2-VL-7B": _qwen2_vl(_qwen2(3584, 28, 28, 4, 18944, 152064, False)),
    "Qwen2-VL-72B": _qwen2_vl(_qwen2(8192, 80, 64, 8, 29568, 152064, False)),
    "LLaVA-OneVision-0.5B": _llava(_qwen2(896, 24, 14, 2, 4864, 152000, True)),
    "LLaVA-OneVision-7B": _llava(_qwen2(3584, 28, 28, 4, 18944, 152128, False)),
    "LLaVA-OneVision-72B": _llava(_qwen2(8192, 80, 64, 8, 29568, 152128, False)),
    "LLaVA-OneVision-0.5B (lmms-lab)": _lmms_lab(_qwen2(896, 24, 14, 2, 4864, 151936, True)),
    "InternVL2-1B": _internvl(VIT, "Hermes-2", _qwen2(896, 24, 14, 2, 4864, 151655, False)),
    "InternVL2-2B": _internvl(
        VIT, "internlm2-chat", _plain("internlm2", 2048, 24, 16, 8, 8192, 92553, **DYNAMIC)
    ),
    "InternVL2-4B": _internvl(
        VIT, "phi3-chat", _plain("phi3", 3072, 32, 32, 32, 8192, 32020, **SU)
    ),
    "InternVL2-8B": _internvl(
        VIT, "internlm2-chat", _plain("internlm2", 4096, 32, 32, 8, 14336, 92553, **DYNAMIC)
    ),
    "InternVL2-26B": _internvl(
        BIG_VIT, "internlm2-chat", _plain("internlm2", 6144, 48, 48, 8, 16384, 92553, **DYNAMIC)
    ),
    "InternVL2-40B": _internvl(
        BIG_VIT, "Hermes-2", _plain("llama", 7168, 60, 56, 8, 20480, 64007, rope_theta=5e6)
    ),
    "InternVL2-76B": _internvl(
        BIG_VIT, "internlm2-chat", _plain("llama", 8192, 80, 64, 8, 28672, 128265, rope_theta=5e5)
    ),
}

PARAMETERS = {
    "Qwen2-VL-2B": 2209,
    "Qwen2-VL-7B": 8291,
    "Qwen2-VL-72B": 73406,
    "LLaVA-OneVision-0.5B": 894,
    "LLaVA-OneVision-7B": 8031,
    "LLaVA-OneVision-72B": 73183,
    "InternVL2-1B": 938,
    "InternVL2-2B": 2206,
    "InternVL2-4B": 4147,
    "InternVL2-8B": 8076,
    "InternVL2-26B": 25514,
    "InternVL2-40B": 40069,
    "InternVL2-76B": 76262,
}
