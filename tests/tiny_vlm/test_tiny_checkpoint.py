"""The committed mgvq-tiny-vl checkpoint answers its own stored questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tiny_vlm.conversations import Encoder
from benchmarks.tiny_vlm.evaluate import by_kind, generate, read_questions, score
from benchmarks.tiny_vlm.export import load_checkpoint

FOLDER = Path(__file__).parents[2] / "benchmarks/tiny_vlm"
DENSE = FOLDER / "dense"

pytestmark = pytest.mark.skipif(
    not (DENSE / "model.safetensors").exists(), reason="no trained checkpoint in dense/"
)


def test_sample_of_the_test_set_is_answered() -> None:
    questions, pictures = read_questions(DENSE / "questions.zip")
    chosen = questions[::25]
    scores = score(load_checkpoint(DENSE).eval(), Encoder(DENSE), chosen, pictures)
    table = by_kind(chosen, scores)
    assert table["= drawn kinds"]["accuracy"] > 0.92
    assert table["= all"]["accuracy"] > table["= all"]["question_only"] + 0.45


def test_transformers_judges_the_same() -> None:
    pytest.importorskip("transformers")
    questions, pictures = read_questions(DENSE / "questions.zip")
    chosen = questions[::625]
    scores = score(load_checkpoint(DENSE).eval(), Encoder(DENSE), chosen, pictures)
    answers = generate(DENSE, chosen, pictures)
    for question, answer in zip(chosen, answers, strict=True):
        assert (answer == question.answer) == scores[question.id].is_right


def test_demo_pictures_are_answered() -> None:
    demo = json.loads((FOLDER / "demo_pictures/demo_pictures.json").read_text())
    assert len(demo) == 6
    for name, pairs in demo.items():
        assert (FOLDER / "demo_pictures" / name).stat().st_size < 60_000
        assert pairs
