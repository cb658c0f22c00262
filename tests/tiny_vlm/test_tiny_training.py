"""A training run is the same for one worker or two, and after an interruption."""

from __future__ import annotations

import argparse
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_vlm import train
from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.losses import training_model
from benchmarks.tiny_vlm.recipe import Recipe

DENSE = Path(__file__).parents[2] / "benchmarks/tiny_vlm/dense"
RECIPE = replace(
    Recipe(),
    steps=3,
    tower_steps=1,
    decay_share=0.0,
    rows=2,
    pictures=1,
    tower_pictures=2,
    warmup_steps=1,
)


@pytest.fixture(autouse=True)
def _without_downloads(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.assets_module, "load", lambda cache, split: assets)
    monkeypatch.setattr(train, "watch_set", lambda *_: [])
    monkeypatch.setattr(train, "choose_size", lambda _: (84, 84))  # its pictures need no fonts


def run(folder: Path, workers: int, recipe: Recipe = RECIPE, resume: bool = False) -> torch.Tensor:
    """Train in threads; return the weights."""
    folder.mkdir(exist_ok=True)
    arguments = argparse.Namespace(
        state=folder,
        processor=DENSE,
        cache=None,
        device="cpu",
        compile=False,
        watch_every=1000,
        save_every_s=1000,
    )
    model = training_model()
    model.initialise(recipe.seed)
    shared = train.allocate(model, recipe, workers, torch.float32)
    first = train.resume(shared, recipe, folder / "state.safetensors") if resume else 0
    barrier = threading.Barrier(workers)
    crew = [train.Worker(i, workers, recipe, shared, barrier, arguments) for i in range(workers)]
    threads = [threading.Thread(target=worker.run, args=(first,)) for worker in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return shared.master


def test_one_or_two_workers_and_an_interruption_give_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", workers=1)
    assert torch.isfinite(whole).all()
    assert torch.equal(run(tmp_path / "two", workers=2), whole)
    half = run(tmp_path / "half", 1, replace(RECIPE, steps=2))
    assert not torch.equal(half, whole)
    assert torch.equal(run(tmp_path / "half", 1, resume=True), whole)


def test_a_changed_recipe_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path, 1, replace(RECIPE, steps=1))
    with pytest.raises(ValueError, match="look_weight"):
        run(tmp_path, 1, replace(RECIPE, look_weight=0.1), resume=True)
