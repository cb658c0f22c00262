"""Writes a state dict as a Qwen2-VL folder in the hub's flat dialect, and reads one (by `train`).

Not here: the tokenizer and processor files (`train_tokenizer`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.tiny_vlm.model import ModelConfig, TinyVLM

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def hub_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """The flat `config.json` of a Qwen2-VL checkpoint."""

    def token(name: str) -> int:
        return int(tokenizer.token_to_id(name))

    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "image_token_id": token("<|image_pad|>"),
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 4096,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": token("<|endoftext|>"),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "rope_theta": config.rope_theta,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "depth": config.vision_depth,
            "embed_dim": config.vision_dim,
            "hidden_act": "quick_gelu",
            "hidden_size": config.hidden_size,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": config.vision_mlp_ratio,
            "model_type": "qwen2_vl",
            "num_heads": config.vision_heads,
            "patch_size": config.patch_size,
            "spatial_merge_size": config.spatial_merge_size,
            "spatial_patch_size": config.patch_size,
            "temporal_patch_size": config.temporal_patch_size,
        },
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "vocab_size": config.vocab_size,
    }


def save_checkpoint(
    state: dict[str, Tensor], config: ModelConfig, processor: Path, folder: Path
) -> None:
    """Write a complete model folder; every file is replaced atomically.

    Args:
        state: tensors under the hub's names, any float dtype; stored as bfloat16.
        config: the model's shape.
        processor: folder with the tokenizer and processor files.
        folder: where to write; may be `processor` itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(processor / "tokenizer.json"))
    generation = {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "do_sample": False,
        "eos_token_id": [
            tokenizer.token_to_id("<|im_end|>"),
            tokenizer.token_to_id("<|endoftext|>"),
        ],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    texts = {"config.json": hub_config(config, tokenizer), "generation_config.json": generation}
    for name, content in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, folder / name)
    if processor.resolve() != folder.resolve():
        for name in PROCESSOR_FILES:
            shutil.copy(processor / name, folder / name)
    tensors = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in state.items()}
    partial = folder / ".model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def load_checkpoint(folder: Path) -> TinyVLM:
    """Read a folder written by `save_checkpoint` into the training graph (float32)."""
    raw = json.loads((folder / "config.json").read_text())
    vision = raw["vision_config"]
    config = ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_key_value_heads"],
        intermediate_size=raw["intermediate_size"],
        mrope_section=tuple(raw["rope_scaling"]["mrope_section"]),
        rope_theta=raw["rope_theta"],
        vision_depth=vision["depth"],
        vision_dim=vision["embed_dim"],
        vision_heads=vision["num_heads"],
        vision_mlp_ratio=vision["mlp_ratio"],
    )
    model = TinyVLM(config)
    state = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state)
    return model
