"""The tokenizer's files alone, without a model beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.conftest import train_tokenizer, write_json, write_tokenizer

THINKING_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}"
    "{% else %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<\uff5cAssistant\uff5c>' + content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)
"""As DeepSeek-R1-Distill's: what was thought before is left out of the history."""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with Qwen's special tokens and Qwen2-VL's template; never write into it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    return folder


@pytest.fixture
def thinking_folder(tmp_path: Path) -> Path:
    """A model whose tokens for thoughts are not special, and whose template looks for them."""
    from tokenizers import AddedToken

    folder = tmp_path / "thinking"
    folder.mkdir()
    tokenizer = train_tokenizer()
    turns = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in turns])
    thoughts = ("<think>", "</think>")
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in thoughts])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": THINKING_TEMPLATE})
    return folder
