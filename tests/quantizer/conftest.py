"""A tiny Qwen2-VL folder with calibration data and questions, one quantized, and a tiny Llama."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_runtime.tokenizer import Tokenizer
from tests.runtime.conftest import SPECIAL_TOKENS, hub_config, write_hub_folder, write_tokenizer
from tests.runtime.models.decoders import write_decoder_folder

QUICK = {
    "bits": 2,
    "allocation": "uniform",  # bands of several rates need matrices wider than these
    "codebook_iterations": 3,
    "refit_rounds": 1,
    "tuning_steps": 4,
    "tuning_batch_tokens": 64,
}


SMALL = QUICK | {
    "bits": 2.0,
    "permute": False,
    "max_codebook_overhead": 1e3,  # every matrix its own tables
    "codebook_iterations": 1,
    "tuning_steps": 1,
    "picture_swaps": 0,
    "guided": True,
}
"""For runs that are repeated many times."""


def picture(seed: int) -> bytes:
    """A PNG of noise, one of two sizes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (56 + 28 * (seed % 2), 84, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_calibration(path: Path, rows: list[dict[str, Any]], pictures: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in pictures.items():
            archive.writestr(f"images/{name}", data)
        archive.writestr("conversations.jsonl", "\n".join(map(json.dumps, rows)))
    return path


def llava_row(image: str) -> dict[str, Any]:
    turns = (
        ("human", "<image>\nHow many red circles are there?"),
        ("gpt", "three"),
        ("human", "And blue?"),
        ("gpt", "one blue"),
    )
    return {"image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}


def write_questions(path: Path) -> None:
    rows = [
        {"kind": kind, "images": [f"images/{i}.png"], "question": text, "answer": "three circles"}
        for i in range(4)
        for kind, text in (("count", "How many circles?"), ("what", "What is in the picture?"))
    ]
    both = ["images/0.png", "images/1.png"]
    asked = "<image> and <image>: are they the same?"
    rows.append({"kind": "two", "images": both, "question": asked, "answer": "no"})
    rows.append({"kind": "text", "images": [], "question": "Is it day?", "answer": "Yes"})
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(4):
            archive.writestr(f"images/{i}.png", picture(i))
        archive.writestr("questions.jsonl", "\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder with `calibration.zip` and `questions.zip`: read it, never write into it."""
    folder = tmp_path_factory.mktemp("dense")
    write_hub_folder(folder, seed=0)
    pictures = {f"{i}.png": picture(i) for i in range(6)}
    write_calibration(folder / "calibration.zip", [llava_row(name) for name in pictures], pictures)
    write_questions(folder / "questions.zip")
    return folder


@pytest.fixture(scope="session")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder with one block in tower and decoder: copy it before changing it."""
    folder = tmp_path_factory.mktemp("small")
    tower = hub_config(dict.fromkeys(SPECIAL_TOKENS, 0))["vision_config"] | {"depth": 1}
    write_hub_folder(folder, seed=2, num_hidden_layers=1, vision_config=tower)
    shutil.copy(dense / "calibration.zip", folder)
    return folder


@pytest.fixture(scope="session")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The folder at 2 bits, and the report of the run."""
    output = tmp_path_factory.mktemp("quantized") / "checkpoint"
    return output, quantize(dense, output, QuantRecipe(**QUICK), show_progress=False)


@pytest.fixture
def correlated() -> Callable[[int, int], torch.Tensor]:
    """Make second moments like those of a language model: uneven channels, decaying spectrum."""

    def make(width: int, seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
        spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.8
        spread = torch.exp(0.7 * torch.randn(width, generator=g, dtype=torch.float64))
        return spread[:, None] * (basis * spectrum @ basis.T) * spread

    return make


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of a tiny text-only Llama with a tied head, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder)
    size = Tokenizer.from_folder(folder).vocab_size
    return folder, write_decoder_folder(folder, "llama-tied-mqa", vocab_size=size)
