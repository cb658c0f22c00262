"""Placeholders and three-axis positions, against transformers' `get_rope_index`."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mgvq_runtime.errors import RequestError
from mgvq_runtime.multimodal.prompt import expand_image_tokens, mrope_positions

IMAGE, START, END = 90, 91, 92


def reference_positions(ids: list[int], grids: list[tuple[int, int, int]], merge: int) -> tuple:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    # get_rope_index reads only the merge size and a method of the model: no weights are needed.
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge)),
        get_vision_position_ids=lambda *a, **k: Qwen2VLModel.get_vision_position_ids(None, *a, **k),
    )
    input_ids = torch.tensor([ids])
    positions, deltas = Qwen2VLModel.get_rope_index(
        model, input_ids, (input_ids == IMAGE).int(), torch.tensor(grids) if grids else None
    )
    return positions[:, 0].numpy(), int(deltas[0, 0])


def random_prompt(rng: random.Random, merge: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    ids, grids = [1] * rng.randint(0, 6), []
    for _ in range(rng.randint(0, 3)):
        grid = (1, merge * rng.randint(1, 9), merge * rng.randint(1, 9))
        grids.append(grid)
        ids += [START] + [IMAGE] * (grid[1] * grid[2] // merge**2) + [END]
        ids += [rng.randint(2, 80) for _ in range(rng.randint(0, 9))]
    return ids or [5], grids


def test_positions_are_those_of_transformers() -> None:
    rng = random.Random(0)
    num_images = [0, 0, 0, 0]
    for _ in range(200):
        merge = rng.choice([2, 2, 3])
        ids, grids = random_prompt(rng, merge)
        num_images[len(grids)] += 1
        positions, delta = mrope_positions(ids, grids, IMAGE, merge)
        expected, expected_delta = reference_positions(ids, grids, merge)
        assert positions.dtype == np.int64
        assert np.array_equal(positions, expected)
        assert delta == expected_delta
    assert min(num_images) > 20


def test_worked_example() -> None:
    """Two texts around an image of 2 x 3 merged patches."""
    ids = [1, START, *[IMAGE] * 6, END, 2]
    positions, delta = mrope_positions(ids, [(1, 4, 6)], IMAGE, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert delta == 7 - len(ids)


def test_neighbouring_images_and_frames() -> None:
    positions, delta = mrope_positions([IMAGE] * 6, [(1, 2, 4), (2, 2, 4)], IMAGE, 2)
    assert positions[0].tolist() == [0, 0, 2, 2, 3, 3]
    assert positions[2].tolist() == [0, 1, 2, 3, 2, 3]
    assert delta == 4 - 6


def test_no_tokens() -> None:
    positions, delta = mrope_positions([], [], IMAGE, 2)
    assert positions.shape == (3, 0)
    assert delta == 0


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([1, IMAGE, IMAGE], [(1, 2, 2)]),
        ([1, IMAGE], [(1, 2, 4)]),
        ([1, IMAGE, 2, IMAGE], [(1, 2, 4)]),
        ([1, IMAGE], []),
        ([1, 2], [(1, 2, 2)]),
        ([], [(1, 2, 2)]),
    ],
)
def test_placeholders_that_are_not_the_images(ids: list[int], grids: list) -> None:
    with pytest.raises(RequestError, match="placeholders"):
        mrope_positions(ids, grids, IMAGE, 2)


def test_expansion() -> None:
    assert expand_image_tokens([1, IMAGE, 2, IMAGE, 3], [2, 3], IMAGE) == [
        *(1, IMAGE, IMAGE, 2),
        *(IMAGE, IMAGE, IMAGE, 3),
    ]
    assert expand_image_tokens([1, 2], [], IMAGE) == [1, 2]


@pytest.mark.parametrize("counts", [[], [4], [1, 2, 3]])
def test_expansion_refuses_a_wrong_count(counts: list[int]) -> None:
    with pytest.raises(RequestError, match=f"2 image placeholders for {len(counts)} images") as e:
        expand_image_tokens([IMAGE, 1, IMAGE], counts, IMAGE)
    assert e.value.param == "messages"
