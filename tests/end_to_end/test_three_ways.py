"""Fifty conversations, three ways: over HTTP, through LLM.chat, and by transformers itself.

The dense demonstration model, greedy, float32: the text must be the same to the character. The
quantized one then answers through the same server, streamed and not.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mgvq_runtime import LLM, Engine, EngineConfig, SamplingParams, demo_checkpoint_path
from tests.serve.conftest import MODEL, RunningServer, start_server

DENSE = Path(__file__).resolve().parents[2] / "benchmarks/tiny_vlm/dense"
NUM_CONVERSATIONS = 50
MAX_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Unseen questions of every kind: no picture, one, or several."""
    with zipfile.ZipFile(DENSE / "questions.zip") as archive:
        every = [json.loads(line) for line in archive.read("questions.jsonl").splitlines()]
        chosen = every[:: len(every) // NUM_CONVERSATIONS][:NUM_CONVERSATIONS]
        for row in chosen:
            row["files"] = [archive.read(name) for name in row["images"]]
    return chosen


def conversation(row: Row) -> list[dict[str, Any]]:
    urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in row["files"]]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}]


@pytest.fixture(scope="module")
def offline(rows: list[Row]) -> list[str]:
    with LLM(DENSE, device="cpu") as llm:
        return [reply.text for reply in llm.chat([conversation(row) for row in rows], GREEDY)]


@pytest.fixture(scope="module", params=["dense", "quantized"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, RunningServer]]:
    folder = DENSE if request.param == "dense" else demo_checkpoint_path()
    running = start_server(Engine.from_checkpoint(folder, EngineConfig(device="cpu")))
    yield request.param, running
    running.stop()


def complete(server: RunningServer, row: Row) -> str:
    with server.client() as client:
        reply = client.chat.completions.create(
            model=MODEL, messages=conversation(row), temperature=0, max_tokens=MAX_TOKENS
        )
    return reply.choices[0].message.content or ""


def stream(server: RunningServer, row: Row) -> str:
    with server.client() as client:
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=conversation(row),
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_http_says_what_the_engine_says(
    server: tuple[str, RunningServer], rows: list[Row], offline: list[str]
) -> None:
    kind, running = server
    texts = [complete(running, row) for row in rows]
    if kind == "dense":
        assert texts == offline
    right = sum(text == row["answer"] for text, row in zip(texts, rows, strict=True))
    without_looking = sum(row["baseline_answer"] == row["answer"] for row in rows)
    assert right > 2 * without_looking, f"{right} right, {without_looking} without looking"
    assert [stream(running, row) for row in rows[::10]] == texts[::10]


def test_transformers_generates_the_same(rows: list[Row], offline: list[str]) -> None:
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    model = Qwen2VLForConditionalGeneration.from_pretrained(DENSE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DENSE)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(DENSE)
    for row, ours in zip(rows, offline, strict=True):
        parts = [{"type": "image"} for _ in row["files"]]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": row["question"]}]}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        vision: dict[str, Any] = {}
        if row["files"]:
            pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in row["files"]]
            vision = dict(image_processor(pictures, return_tensors="pt"))
            for grid in vision["image_grid_thw"]:
                pads = "<|placeholder|>" * (int(grid.prod()) // 4)
                text = text.replace("<|image_pad|>", pads, 1)
            text = text.replace("<|placeholder|>", "<|image_pad|>")
        inputs = tokenizer(text, return_tensors="pt")
        is_image = inputs["input_ids"] == model.config.image_token_id
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                **vision,
                mm_token_type_ids=is_image.int(),
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )
        answer = output[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == ours, row
