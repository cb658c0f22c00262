"""Tiny Qwen2-VL checkpoint folders with random weights, for every test of the runtime.

`tiny_qwen2_vl_folder` speaks the hub's dialect (flat config, `visual.*` and `model.*` keys),
`tiny_qwen2_vl_v5_folder` the dialect that transformers 5 writes; both hold the same weights, a
byte-level BPE tokenizer trained here with Qwen's special tokens, and every file a real one has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "You are a helpful assistant. system user assistant What is in the picture? Describe it.",
    "How many red circles are there? There are three red circles and one blue square.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; isn't that fine?",
    "Der schnelle braune Fuchs. Où est la bibliothèque? 画像には何がありますか。",
) * 8
VOCAB_SIZE = 512
PREPROCESSOR_CONFIG: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def train_tokenizer() -> Any:
    """Return a tokenizers.Tokenizer: byte-level BPE as Qwen2's, trained on `CORPUS`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 32,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write every tokenizer, template and processor file a hub folder has; return special ids."""
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ids = {token: int(tokenizer.token_to_id(token)) for token in SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": t, **flags, "special": True} for t, i in ids.items()}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": True,
            "temperature": 0.01,
            "top_k": 1,
            "top_p": 0.001,
        },
    )
    return ids


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def hub_config(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    """Return a flat Qwen2-VL config.json of a tiny model, as the hub spells it."""
    config: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 2048,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": overrides.get("hidden_size", 64),
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": VOCAB_SIZE,
    }
    config.update(overrides)
    return config


def random_reference(config: dict[str, Any], seed: int) -> Any:
    """Return transformers' Qwen2-VL with seeded random weights, norms and biases included."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_q" in name
            if is_norm and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def hub_key(name: str) -> str:
    """Return the hub's name of a tensor that transformers 5 holds under `name`."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_hub_weights(folder: Path, model: Any) -> None:
    """Write a model's weights under the hub's names, a tied head left out."""
    tensors = {hub_key(name): p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_hub_folder(folder: Path, seed: int, **overrides: Any) -> Any:
    """Fill a folder in the hub's dialect; return the reference model behind it."""
    ids = write_tokenizer(folder)
    config = hub_config(ids, **overrides)
    model = random_reference(config, seed)
    write_hub_weights(folder, model)
    write_json(folder / "config.json", config)
    return model


@pytest.fixture(scope="session")
def _tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny_qwen2_vl")
    return folder, write_hub_folder(folder, seed=0)


@pytest.fixture(scope="session")
def tiny_qwen2_vl_folder(_tiny_qwen2_vl: tuple[Path, Any]) -> Path:
    """A complete Qwen2-VL folder in the hub's dialect: read it, never write into it."""
    return _tiny_qwen2_vl[0]


@pytest.fixture(scope="session")
def tiny_qwen2_vl_v5_folder(
    _tiny_qwen2_vl: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model as transformers 5 saves it: nested config, `model.language_model.*` keys."""
    folder = tmp_path_factory.mktemp("tiny_qwen2_vl_v5")
    write_tokenizer(folder)
    _tiny_qwen2_vl[1].save_pretrained(folder, save_original_format=False)
    return folder
