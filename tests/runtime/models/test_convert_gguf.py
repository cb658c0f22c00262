"""GGUF to a Llama folder: what llama.cpp permutes comes back in place, tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.real_decoders.convert_gguf import write_llama
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.tokenizer import Tokenizer
from tests.runtime.conftest import SPECIAL_TOKENS, train_tokenizer
from tests.runtime.models.decoders import decoder_config, reference_decoder

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
RENAMES = {
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """As ggml-org/llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute, has it."""
    shape = (num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def facts_of(config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = train_tokenizer()
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "general.architecture": "llama",
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL_TOKENS else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.mark.parametrize("kind", ["llama", "llama-tied-mqa"])
def test_the_folder_is_the_model(tmp_path: Path, kind: str) -> None:
    config = decoder_config(kind)
    reference = reference_decoder(config).half()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = []
    for name, parameter in reference.named_parameters():
        array = parameter.detach().numpy()
        for part, count in heads.items():
            array = permute(array, count) if part in name else array
        for ours, theirs in RENAMES.items():
            name = name.replace(ours, theirs)
        tensors.append((name, array))
    write_llama(facts_of(config), tensors, tmp_path)
    model, state = load_model(tmp_path), reference.float().state_dict()
    layer = "model.layers.1.self_attn"
    qkv = torch.cat([state[f"{layer}.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(model.model.layers[1].self_attn.qkv_proj.weight, qkv)
    assert torch.equal(model.model.norm.weight, state["model.norm.weight"])
    assert model.config.tie_word_embeddings == config["tie_word_embeddings"]
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_ids == {tokenizer.special_id("im_end")}
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is 12?"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "What is 12?<|im_end|>"


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    facts = facts_of(decoder_config("llama")) | {"general.architecture": "gemma"}
    with pytest.raises(ValueError, match="only llama"):
        write_llama(facts, [], tmp_path)
