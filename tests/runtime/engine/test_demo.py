"""The bundled 2-bit model says the same, however its requests are run."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.startup import start
from mgvq_runtime.request import Prompt, Request, SamplingParams
from tests.runtime.engine.engine_runs import finish, run, tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NUM_QUESTIONS = 8


@pytest.fixture(scope="module")
def loaded() -> Any:
    return start(None, EngineConfig(device="cpu", max_model_len=512))[:3]


@pytest.fixture(scope="module")
def asked(loaded: Any) -> list[Prompt]:
    """Questions of all kinds; several on one picture, all pictures of about the same size."""
    with zipfile.ZipFile(demo_checkpoint_path() / "questions.zip") as archive:
        rows = [json.loads(line) for line in archive.read("questions.jsonl").splitlines()]
        chosen = rows[:2] + rows[2 :: len(rows) // (NUM_QUESTIONS - 2)]
        return [to_prompt(loaded[1], archive, row) for row in chosen[:NUM_QUESTIONS]]


def to_prompt(processor: Any, archive: zipfile.ZipFile, row: dict[str, Any]) -> Prompt:
    pictures = [Image.open(io.BytesIO(archive.read(name))) for name in row["images"]]
    parts: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
    parts.append({"type": "text", "text": row["question"]})
    return processor.prepare([{"role": "user", "content": parts}], pictures)


def answers(engine: Engine, asked: list[Prompt]) -> list[list[int]]:
    outputs = run(engine, asked, GREEDY)
    return [tokens(outputs[str(index)]) for index in range(len(asked))]


@pytest.fixture(scope="module")
def alone(loaded: Any, asked: list[Prompt]) -> list[list[int]]:
    """Each question asked of an engine of its own that has seen nothing."""
    model, processor, resolved = loaded
    found = []
    for one in asked:
        engine = Engine(model, processor, replace(resolved, image_cache_bytes=0))
        engine.add(Request("r", one, GREEDY))
        found.append(tokens(finish(engine)["r"]))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batch_tokens": 16},
        {"max_batch_tokens": 64},
        {"max_batch_tokens": 256},
        {"block_size": 4, "num_kv_blocks": 110},
        {"image_cache_bytes": 0, "max_batch_patches": 1},
    ],
    ids=["batch of 8", "chunks of 16", "of 64", "of 256", "preempted", "one picture a step"],
)
def test_greedy_text_is_that_of_a_request_alone(
    loaded: Any, asked: list[Prompt], alone: list[list[int]], changes: dict[str, int]
) -> None:
    model, processor, resolved = loaded
    engine = Engine(model, processor, replace(resolved, **changes))
    assert answers(engine, asked) == alone
    assert (engine.num_preemptions > 0) == ("block_size" in changes)
    assert answers(engine, asked) == alone, "with a warm cache"
