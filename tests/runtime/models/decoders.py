"""Tiny text-only folders of every decoder, with random weights, and transformers' model of each.

InternLM2 is not part of transformers: its folder is a Llama's, after the published mapping of names
and rows (OpenGVLab/InternVL2-2B, modeling_internlm2.py), done here head by head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "type": "su",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2-untied": ("qwen2", {"num_key_value_heads": 4, "rope_theta": 1e6}),
    "llama": ("llama", {}),
    "llama-tied-mqa": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "internlm2": ("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "internlm2-biases": ("internlm2", {"bias": True, "num_key_value_heads": 1}),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "phi3-su": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64, "sliding_window": 2048},
    ),
}
"""model_type, and what differs from `COMMON`."""

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def decoder_config(name: str, **overrides: Any) -> dict[str, Any]:
    """Return the config.json of one of `DECODERS`, as the hub spells it."""
    kind, changes = DECODERS[name]
    biases = {"bias": False} if kind == "internlm2" else {}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **COMMON,
        **biases,
        **json.loads(json.dumps(changes)),
        **overrides,
    }


def reference_decoder(config: dict[str, Any], seed: int = 0) -> Any:
    """Return transformers' model with seeded random weights; of InternLM2 the equivalent Llama."""
    import transformers

    values = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    kind = config["model_type"]
    if kind == "internlm2":
        kind, values["attention_bias"] = "llama", values.pop("bias")
    if values.get("rope_scaling", {}).get("type") == "su":  # renamed since
        values["rope_scaling"] = {**values["rope_scaling"], "type": "longrope"}
    config_class = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(values)))
    model = getattr(transformers, ARCHITECTURES[kind])(config_class).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in parameter_name:
                parameter.copy_(1.0 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def hub_tensors(config: dict[str, Any], reference: Any) -> dict[str, Tensor]:
    """Return the tensors as the hub's folder of this decoder names and orders them."""
    tensors = {n: p.detach().contiguous() for n, p in reference.named_parameters()}
    return internlm2_tensors(config, tensors) if config["model_type"] == "internlm2" else tensors


def internlm2_tensors(config: dict[str, Any], llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Llama's tensors to InternLM2's; queries, key and value of a group lie together."""
    groups = config["num_key_value_heads"]
    per_group = config["num_attention_heads"] // groups
    renames = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    renamed = {}
    for name, tensor in llama.items():
        if "q_proj" in name:
            q, k, v = (llama[name.replace("q_proj", f"{p}_proj")] for p in "qkv")
            width = k.shape[0] // groups
            rows = []
            for group in range(groups):
                rows.append(q[group * per_group * width : (group + 1) * per_group * width])
                rows += [part[group * width : (group + 1) * width] for part in (k, v)]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in renames.items():
                name = name.replace(old, new)
            renamed[name] = tensor
    return renamed


def write_decoder_folder(folder: Path, name: str, seed: int = 0, **overrides: Any) -> Any:
    """Write config.json and model.safetensors as on the hub; return transformers' model."""
    config = decoder_config(name, **overrides)
    reference = reference_decoder(config, seed)
    folder.mkdir(exist_ok=True)
    save_file(hub_tensors(config, reference), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return reference
