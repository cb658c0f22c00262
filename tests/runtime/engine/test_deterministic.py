"""With `deterministic`, the bundled model's logits are the same bits however a request is run."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from mgvq_runtime.assets import demo_checkpoint_path
from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.startup import start
from mgvq_runtime.request import Prompt, Request, RequestOutput, SamplingParams
from tests.runtime.engine.engine_runs import finish, run

NUM_QUESTIONS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
Rows = dict[tuple[int, ...], torch.Tensor]
"""Logits `[V]` by the tokens that come before, the question's own number first."""


@pytest.fixture(scope="module")
def loaded() -> Any:
    return start(None, EngineConfig(device="cpu", max_model_len=512, deterministic=True))[:3]


@pytest.fixture(scope="module")
def asked(loaded: Any) -> list[Prompt]:
    """Questions of all kinds with their pictures; the first two show others of one size."""
    with zipfile.ZipFile(demo_checkpoint_path() / "questions.zip") as archive:
        lines = [json.loads(line) for line in archive.read("questions.jsonl").splitlines()]
        found = []
        for row in lines[:: len(lines) // NUM_QUESTIONS][:NUM_QUESTIONS]:
            pictures = [Image.open(io.BytesIO(archive.read(name))) for name in row["images"]]
            parts: list[dict[str, str]] = [{"type": "image"} for _ in pictures]
            parts.append({"type": "text", "text": row["question"]})
            found.append(loaded[1].prepare([{"role": "user", "content": parts}], pictures))
    first = found[0]
    turned = replace(first.images[0], patches=first.images[0].patches[::-1].copy())
    found[1] = replace(first, images=(turned, *first.images[1:]))
    assert found[1].token_ids == first.token_ids
    assert found[1].images[0].digest != first.images[0].digest
    return found


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Return a mapping that will hold all the logits this engine makes."""
    rows: Rows = {}
    forward = engine._runner.run

    def watched(chunks: Any) -> torch.Tensor:
        logits = forward(chunks)
        sampled = [chunk.sequence for chunk in chunks if chunk.is_sampled]
        for sequence, row in zip(sampled, logits, strict=True):
            answer = sequence.token_ids[sequence.num_prompt_tokens :]
            rows[int(sequence.request_id), *answer] = row.clone()
        return logits

    monkeypatch.setattr(engine._runner, "run", watched)
    return rows


@pytest.fixture(scope="module")
def alone(loaded: Any, asked: list[Prompt]) -> Rows:
    """What each question gives to an engine of its own that has seen nothing."""
    model, processor, resolved = loaded
    rows: Rows = {}
    with pytest.MonkeyPatch.context() as patch:
        for index, one in enumerate(asked):
            engine = Engine(model, processor, resolved)
            found = watch(engine, patch)
            engine.add(Request(str(index), one, GREEDY))
            finish(engine)
            rows |= found
    assert len(rows) == NUM_QUESTIONS * GREEDY.max_tokens
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batch_tokens": 16},
        {"max_batch_tokens": 64},
        {"max_batch_tokens": 256},
        {"block_size": 4, "num_kv_blocks": 80},
        {"image_cache_bytes": 0, "max_batch_patches": 1},
    ],
    ids=["batch of 8", "chunks of 16", "of 64", "of 256", "preempted", "one picture a step"],
)
def test_logits_are_the_bits_of_a_request_alone(
    loaded: Any,
    asked: list[Prompt],
    alone: Rows,
    changes: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal logits, so equal text, with a cold cache and with a warm one."""
    model, processor, resolved = loaded
    engine = Engine(model, processor, replace(resolved, **changes))
    for temperature in ("cold", "warm"):
        rows = watch(engine, monkeypatch)
        run(engine, asked, GREEDY)
        assert rows.keys() == alone.keys(), f"another text with a {temperature} cache"
        assert all(torch.equal(row, alone[key]) for key, row in rows.items()), temperature
        monkeypatch.undo()
    assert (engine.num_preemptions > 0) == ("block_size" in changes)


def test_pictures_of_one_size_back_to_back_share_nothing(
    loaded: Any, asked: list[Prompt], alone: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, resolved = loaded
    engine = Engine(model, processor, replace(resolved, block_size=4))
    rows = watch(engine, monkeypatch)
    start_of_picture = asked[0].token_ids.index(model.config.image_token_id)
    cached = []
    for index in (0, 1, 0):
        engine.add(Request(str(index), asked[index], GREEDY))
        outputs: list[RequestOutput] = finish(engine)[str(index)]
        cached.append(outputs[-1].num_cached_tokens)
    assert cached[0] == 0
    assert cached[1] <= start_of_picture < cached[2]
    assert all(torch.equal(row, alone[key]) for key, row in rows.items())
    assert not torch.equal(alone[0,], alone[1,]), "the pictures make a difference"


def test_without_it_company_changes_bits(
    loaded: Any, asked: list[Prompt], alone: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the tests above would prove nothing."""
    model, processor, resolved = loaded
    engine = Engine(model, processor, replace(resolved, deterministic=False))
    rows = watch(engine, monkeypatch)
    run(engine, asked, GREEDY)
    assert any(not torch.equal(row, alone[key]) for key, row in rows.items() if key in alone)
