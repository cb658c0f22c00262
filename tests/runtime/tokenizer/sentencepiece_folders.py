"""Folders with a `tokenizer.model` trained here by sentencepiece, in the style of real families."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

CORPUS = (
    "You are a helpful assistant. What is in the picture? Describe it in one sentence.",
    "How many red circles are there? There are three red circles and one blue square.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; isn't that fine?",
    "Der schnelle braune Fuchs. Où est la bibliothèque? 画像には何がありますか。",
) * 8
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNUSED = [f"[UNUSED_TOKEN_{i}]" for i in range(3)]


def train(**options: Any) -> bytes:
    """Return a `tokenizer.model`: byte pairs with byte fallback, text left as it is."""
    written = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, **{**settings, **options}
    )
    return written.getvalue()


def write_folder(
    folder: Path, data: bytes, template: str, added: Mapping[str, int], **config: Any
) -> Path:
    """Write the files a hub folder of that time has: no tokenizer.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    values |= {"chat_template": template, "tokenizer_class": "LlamaTokenizer", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def internlm2_folder(folder: Path) -> Path:
    """No dummy prefix; special tokens in the places of unused pieces, and pictures' behind."""
    data = train(add_dummy_prefix=False, user_defined_symbols=UNUSED)
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    size = processor.get_piece_size()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "special": True}
    places = [processor.piece_to_id(piece) for piece in UNUSED]
    names = ["<|im_start|>", "<|im_end|>", "<|action_start|>"]
    decoder = {str(i): {"content": n, **flags} for i, n in zip(places, names, strict=True)}
    added = {"<img>": size, "</img>": size + 1, "<IMG_CONTEXT>": size + 2}
    return write_folder(
        folder,
        data,
        CHATML,
        added,
        added_tokens_decoder=decoder,
        additional_special_tokens=[*names, *added],
        tokenizer_class="InternLM2Tokenizer",
    )


def phi3_folder(folder: Path) -> Path:
    """A dummy prefix at the beginning only; special tokens that eat the space behind them."""
    data = train()
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    added = {name: size + i for i, name in enumerate(names)}
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "special": True}
    decoder = {str(number): {"content": name, **flags} for name, number in added.items()}
    return write_folder(folder, data, PHI3, added, legacy=False, added_tokens_decoder=decoder)


def llama_folder(folder: Path) -> Path:
    """A dummy prefix for every stretch of text, as Llama 2 and Yi began."""
    data = train()
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    return write_folder(
        folder, data, CHATML, added, legacy=True, additional_special_tokens=list(added)
    )


FOLDERS = {"internlm2": internlm2_folder, "phi3": phi3_folder, "llama": llama_folder}
