"""Placeholders and three-axis positions, against transformers' `get_rope_index`."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mgvq_runtime.errors import RequestError
from mgvq_runtime.multimodal.prompt import expand_placeholders, mrope_positions
from mgvq_runtime.request import ImageInput

IMAGE, START, END, VIDEO = 90, 91, 92, 93


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
        positions, delta = mrope_positions(ids, grids, (IMAGE,), merge)
        expected, expected_delta = reference_positions(ids, grids, merge)
        assert positions.dtype == np.int64
        assert np.array_equal(positions, expected)
        assert delta == expected_delta
    assert min(num_images) > 20


def test_worked_example() -> None:
    """Two texts around an image of 2 x 3 merged patches."""
    ids = [1, START, *[IMAGE] * 6, END, 2]
    positions, delta = mrope_positions(ids, [(1, 4, 6)], (IMAGE,), 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert delta == 7 - len(ids)


def positions_of_transformers_4(
    ids: list[int], grids: list[tuple[int, int, int]], merge: int
) -> np.ndarray:
    """The published rule, token by token: each part begins one above all that came before it."""
    columns: list[tuple[int, int, int]] = []
    left = iter(grids)
    i = 0
    while i < len(ids):
        start = max((max(column) for column in columns), default=-1) + 1
        if ids[i] not in (IMAGE, VIDEO):
            columns.append((start, start, start))
            i += 1
            continue
        t, h, w = next(left)
        for frame in range(t):
            for row in range(h // merge):
                for column in range(w // merge):
                    columns.append((start + frame, start + row, start + column))
                    i += 1
    return np.array(columns, dtype=np.int64).reshape(-1, 3).T


def test_positions_of_videos() -> None:
    """Pictures and videos, longer than they are wide or not, side by side or apart."""
    rng = random.Random(3)
    num_long = 0
    for _ in range(200):
        merge = rng.choice([2, 3])
        ids, grids = [1] * rng.randint(0, 4), []
        for _ in range(rng.randint(1, 3)):
            is_video = rng.random() < 0.6
            t = rng.randint(1, 12) if is_video else 1
            grid = (t, merge * rng.randint(1, 6), merge * rng.randint(1, 6))
            grids.append(grid)
            ids += [VIDEO if is_video else IMAGE] * (t * grid[1] * grid[2] // merge**2)
            ids += [rng.randint(2, 80) for _ in range(rng.randint(0, 3))]
            num_long += t > max(grid[1:]) // merge
        positions, delta = mrope_positions(ids, grids, (IMAGE, VIDEO), merge)
        assert np.array_equal(positions, positions_of_transformers_4(ids, grids, merge))
        assert delta == positions.max() + 1 - len(ids)
    assert num_long > 50


def test_no_tokens() -> None:
    positions, delta = mrope_positions([], [], (IMAGE,), 2)
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
        mrope_positions(ids, grids, (IMAGE,), 2)


def image(num_tokens: int) -> ImageInput:
    return ImageInput(np.zeros((1, 1), np.float32), (1, 1, 1), num_tokens)


def test_expansion() -> None:
    """Placeholders of each kind in order, whichever kind comes first."""
    first, second, video = image(2), image(3), image(4)
    ids = [1, VIDEO, 2, IMAGE, IMAGE, 3]
    expanded, placed = expand_placeholders(ids, {IMAGE: [first, second], VIDEO: [video]})
    assert expanded == [1, *[VIDEO] * 4, 2, *[IMAGE] * 5, 3]
    assert placed == (video, first, second)
    assert expand_placeholders([1, 2], {IMAGE: []}) == ([1, 2], ())


@pytest.mark.parametrize("counts", [[], [4], [1, 2, 3]])
def test_expansion_refuses_a_wrong_count(counts: list[int]) -> None:
    images = [image(count) for count in counts]
    message = f"2 placeholders {IMAGE} for {len(counts)} images"
    with pytest.raises(RequestError, match=message) as e:
        expand_placeholders([IMAGE, 1, IMAGE], {IMAGE: images})
    assert e.value.param == "messages"
