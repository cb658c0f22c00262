"""Stand-ins for the fetched sources: random sprites, no fonts, so that nothing is downloaded."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.tiny_vlm.assets import Assets


@pytest.fixture(scope="module")
def assets() -> Assets:
    random = np.random.default_rng(0)
    sprite = random.integers(0, 256, (96, 96, 4), dtype=np.uint8)
    return Assets(
        split="train",
        digits=random.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        digit_labels=np.arange(20) % 10,
        animals=random.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        animal_labels=np.arange(20) % 10,
        emoji={number: [sprite] for number in range(12)},
        flags={"fr": [sprite], "de": [sprite]},
        easy_vqa=random.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8),
        easy_questions=[[("what color is the shape?", "red")]] * 3,
        words=[],
        fonts=[],
    )
