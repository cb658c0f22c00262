"""Drawn pictures: the same for a seed, and with the answers they should have."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.concepts import HELD_OUT_PAIRS, SHAPES
from benchmarks.tiny_vlm.conversations import several_pairs
from benchmarks.tiny_vlm.drawing import DRAWERS, MIX, draw
from benchmarks.tiny_vlm.patches import to_patches
from benchmarks.tiny_vlm.recipe import Recipe
from benchmarks.tiny_vlm.scenes import position_name

WITHOUT_FONTS = sorted(set(DRAWERS) - {"word", "chart"})


@pytest.mark.parametrize("kind", WITHOUT_FONTS)
def test_drawing_is_the_same_for_a_seed(kind: str, assets: Assets) -> None:
    for size in ((112, 112), (84, 168)):
        one, two = (draw(Random("seed"), assets, kind, size) for _ in range(2))
        assert one.pixels.shape == (*size, 3)
        assert one.pixels.dtype == np.uint8
        assert np.array_equal(one.pixels, two.pixels)
        assert one.questions == two.questions
        assert all(item.answer and 0 <= item.chance <= 0.5 for item in one.questions)


def test_held_out_pairs_are_not_drawn_in_training(assets: Assets) -> None:
    pairs = [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for seed in range(200):
        picture = draw(Random(seed), assets, "shapes", (112, 112))
        seen = [item.answer for item in picture.questions if item.kind == "position"]
        assert not set(seen) & set(pairs)


def test_shape_counts_agree_with_each_other(assets: Assets) -> None:
    for seed in range(100):
        picture = draw(Random(seed), assets, "shapes", (112, 112))
        counts = [int(item.answer) for item in picture.questions if item.kind == "count"]
        assert counts[0] == max(counts)
        assert counts[0] <= 6
    assert len(SHAPES) == 8


def test_positions_have_names() -> None:
    assert position_name(0, 0, 2, 2) == "top left"
    assert position_name(1, 2, 3, 3) == "right"
    assert position_name(0, 0, 1, 1) == "center"


def test_several_pictures_are_told_apart(assets: Assets) -> None:
    pictures = [draw(Random(seed), assets, "emoji", (84, 84)) for seed in (1, 2, 3)]
    answers = {answer for _, answer, _ in several_pairs(Random(0), pictures)}
    assert "3" in answers
    assert any(answer.startswith("the ") for answer in answers)


def test_sizes_fit_the_processor() -> None:
    recipe = Recipe()
    for height, width in MIX:
        assert height % 28 == 0
        assert width % 28 == 0
        assert 56 * 56 <= height * width <= 224 * 224
        rows, _ = recipe.amounts(recipe.tower_steps, (height, width))
        assert rows >= 2


def test_patches_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    image = np.random.default_rng(2).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    processor = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=224 * 224)
    expected = processor(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"]
    import torch

    mine = to_patches(image[None], torch.float32)[0].view(-1, 3, 196)
    frames = torch.from_numpy(expected).view(-1, 3, 2, 196)
    assert torch.allclose(frames[:, :, 0], mine, atol=1e-5)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
