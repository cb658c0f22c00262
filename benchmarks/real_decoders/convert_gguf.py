"""A GGUF file of a Llama as a folder that mgvq-quantize reads (called by `smollm2`).

Weights are dequantized by the `gguf` package, which knows every block format; names, the order of
query and key rows, config.json and tokenizer.json are made here. Only byte-level vocabularies.

Source: ggml-org/llama.cpp, convert_hf_to_gguf.py, whose renaming and permutation this undoes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[np.float32]

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL, _USER_DEFINED = 3, 4


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Array]]]:
    """Open a GGUF file.

    Returns:
        Its facts by key, and its tensors one after another, dequantized, rows first.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    tensors = (
        (t.name, dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)]))
        for t in reader.tensors
    )
    return facts, tensors


def write_llama(
    facts: Mapping[str, Any], tensors: Iterable[tuple[str, Array]], folder: Path
) -> None:
    """Write a `LlamaForCausalLM` folder: config, float16 weights, tokenizer and chat template.

    Args:
        facts: The file's facts; `general.architecture` must be llama.
        tensors: Its tensors, dequantized.
        folder: Made where it does not exist.

    Raises:
        ValueError: if the architecture or the tokenizer is another one.
    """
    if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.model"] != "gpt2":
        raise ValueError("only llama with a byte-level (gpt2) vocabulary is converted")
    heads = facts["llama.attention.head_count"]
    kv_heads = facts["llama.attention.head_count_kv"]
    weights: dict[str, torch.Tensor] = {}
    for name, array in tensors:
        stem, _, leaf = name.rpartition(".")
        if stem.startswith("blk."):
            _, number, part = stem.split(".")
            if part in ("attn_q", "attn_k"):
                array = unpermute(array, heads if part == "attn_q" else kv_heads)
            ours = f"model.layers.{number}.{_BLOCK[part]}.{leaf}"
        else:
            ours = f"{_WHOLE[stem]}.{leaf}"
        weights[ours] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float16))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(facts["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(facts["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(facts, folder)


def unpermute(rows: Array, num_heads: int) -> Array:
    """Undo llama.cpp's order of query and key rows, in which the two halves of a head alternate."""
    halves = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [H, Dh/2, 2, ...]
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json; digits stand alone, as in SmolLM2."""
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": facts["tokenizer.chat_template"],
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
