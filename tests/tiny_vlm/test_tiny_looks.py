"""Which places of a row an answer is said to be read from, and the loss that says so."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.conversations import Encoder, Turn, _padded
from benchmarks.tiny_vlm.drawing import draw
from benchmarks.tiny_vlm.looks import Look, covered, looks_of, packed
from benchmarks.tiny_vlm.losses import look_loss
from benchmarks.tiny_vlm.pictures import QA, Box

DENSE = Path(__file__).parents[2] / "benchmarks/tiny_vlm/dense"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(DENSE)


def test_a_box_covers_the_merged_patches_that_show_most_of_it() -> None:
    inside = Box(30, 2, 50, 26, "star", "red")
    assert covered(inside, (4, 4), first=10) == (11,)
    corner = Box(14, 14, 42, 42, "star", "red")
    assert covered(corner, (4, 4), first=0) == (0, 1, 4, 5)
    mostly_right = Box(20, 0, 56, 28, "star", "red")
    assert covered(mostly_right, (2, 2), first=0) == (1,)
    outside = Box(-20, -20, -1, -1, "star", "red")
    assert covered(outside, (2, 2), first=0) == ()


def test_a_spelled_answer_looks_at_one_box_a_token() -> None:
    things = [(5,), (6,), (7,)]
    item = QA("number", "What number is this?", "the number 57", 0.1, (), (0, 2), True)
    assert looks_of(item, things, query=20, tokens=5) == [
        Look(1, 23, (5,), 1.0),
        Look(1, 24, (7,), 1.0),
    ]


def test_other_answers_look_at_all_their_boxes_with_every_token() -> None:
    item = QA("position", "What is left of the star?", "red circle", 0.1, (1,), (0, 2))
    looks = looks_of(item, [(5,), (6,), ()], query=20, tokens=2)
    assert looks == [Look(0, 20, (6,), 1.0), Look(1, 20, (5,), 0.5), Look(1, 21, (5,), 0.5)]


def test_rows_point_into_their_own_picture(assets: Assets, encoder: Encoder) -> None:
    for seed in range(30):
        picture = draw(Random(seed), assets, "shapes", (112, 112))
        row = encoder.prefix_row((4, 4), picture.questions, picture.boxes)
        assert row.looks
        for look in row.looks:
            assert row.blocks[look.query] > 0
            assert {row.tokens[place] for place in look.keys} == {encoder.image_pad}
            assert row.labels[look.query + 1] >= 0


def test_conversations_point_into_the_picture_that_is_meant(encoder: Encoder) -> None:
    boxes = [[Box(0, 0, 28, 28, "star", "red")], [Box(28, 28, 56, 56, "ring", "blue")]]
    item = QA("several", "What is in the second picture?", "a blue ring", 0.0, (0,), (0,))
    turns = [Turn("user", f"<image><image>{item.question}"), Turn("assistant", "a", item, 1)]
    row = encoder.chat_row(turns, (2, 2), boxes)
    second = [i for i, token in enumerate(row.tokens) if token == encoder.image_pad][4:]
    assert {look.keys for look in row.looks} == {(second[3],)}


def test_look_loss_is_the_mean_log_of_the_attention_on_the_things(encoder: Encoder) -> None:
    looks = [[Look(0, 2, (0, 1), 1.0)], [Look(1, 1, (0,), 0.5), Look(1, 1, (1,), 0.5)]]
    image = np.zeros((0, 28, 28, 3), dtype=np.uint8)
    rows = [encoder.chat_row([Turn("user", "Hi")], (1, 1)) for _ in looks]
    batch = _padded(rows, list(image), (28, 28), encoder.pad)
    batch.looks = packed(looks, 3)
    attention = torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.25, 0.25], [0.1, 0.3, 0.6]])
    hop = attention.expand(2, 1, 3, 3)  # two rows, one head
    expected = -(math.log(0.4) + 0.5 * math.log(0.5) + 0.5 * math.log(0.25)) / 2
    assert float(look_loss([hop, hop], batch)) == pytest.approx(expected, abs=1e-6)
    batch.looks = packed([[], []], 3)
    assert float(look_loss([hop, hop], batch)) == 0.0
