"""The tokenizer's files alone, without a model beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.conftest import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with Qwen's special tokens and Qwen2-VL's template; never write into it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    return folder
