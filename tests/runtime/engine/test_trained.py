"""The engine on the demonstration model's dense original: right answers, and always the same."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.startup import start
from mgvq_runtime.request import Prompt, SamplingParams
from tests.runtime.engine.engine_runs import run

DENSE = Path(__file__).resolve().parents[3] / "benchmarks/tiny_vlm/dense"
NUM_QUESTIONS = 60
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """Unseen questions of all kinds, with their pictures decoded."""
    with zipfile.ZipFile(DENSE / "questions.zip") as archive:
        rows = [json.loads(line) for line in archive.read("questions.jsonl").splitlines()]
        chosen = rows[:: len(rows) // NUM_QUESTIONS][:NUM_QUESTIONS]
        for row in chosen:
            files = [archive.read(name) for name in row["images"]]
            row["pictures"] = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    return chosen


@pytest.fixture(scope="module")
def loaded() -> Any:
    return start(DENSE, EngineConfig(device="cpu", max_model_len=512))[:3]


def ask(engine: Engine, questions: list[dict[str, Any]]) -> list[str]:
    outputs = run(engine, [to_prompt(engine, row) for row in questions], GREEDY)
    return ["".join(o.text for o in outputs[str(i)]) for i in range(len(questions))]


def to_prompt(engine: Engine, row: dict[str, Any]) -> Prompt:
    parts: list[dict[str, str]] = [{"type": "image"} for _ in row["pictures"]]
    parts.append({"type": "text", "text": row["question"]})
    return engine.chat_processor.prepare([{"role": "user", "content": parts}], row["pictures"])


@pytest.fixture(scope="module")
def answers(loaded: Any, questions: list[dict[str, Any]]) -> list[str]:
    model, processor, resolved = loaded
    return ask(Engine(model, processor, resolved), questions)


def test_more_unseen_questions_are_answered_right_than_without_looking(
    answers: list[str], questions: list[dict[str, Any]]
) -> None:
    right = sum(row["answer"] == text for row, text in zip(questions, answers, strict=True))
    without_looking = sum(row["baseline_answer"] == row["answer"] for row in questions)
    assert right > 2 * without_looking, list(zip(questions, answers, strict=True))


@pytest.mark.parametrize(
    "changes",
    [{"max_num_seqs": 1}, {"max_batch_tokens": 16}, {"max_batch_tokens": 64}],
    ids=["alone", "chunks of 16", "chunks of 64"],
)
def test_greedy_text_is_the_same_alone_in_a_batch_and_in_chunks(
    loaded: Any, answers: list[str], questions: list[dict[str, Any]], changes: dict[str, int]
) -> None:
    model, processor, resolved = loaded
    engine = Engine(model, processor, replace(resolved, **changes))
    assert ask(engine, questions) == answers
