"""Exact match by question kind, from one forward pass (called by `train` and `evaluate`).

Greedy decoding gives the right answer exactly when, fed the right answer, the model's first choice
is right at each of its tokens; so no generation is needed to count.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.conversations import Batch, Encoder, Row, _padded
from benchmarks.tiny_vlm.drawing import MIX, choose_type, draw
from benchmarks.tiny_vlm.model import NOT_LOOKING, Looking, TinyVLM
from benchmarks.tiny_vlm.patches import PATCH, to_patches


class Tally(NamedTuple):
    """Right answers and questions."""

    right: int
    asked: int


class Score(NamedTuple):
    """How one answer fared."""

    is_right: bool
    log_likelihood: float
    """Of the right answer and its end token, in nats."""


def forward(
    model: TinyVLM,
    batch: Batch,
    encoder: Encoder,
    features: torch.Tensor | None = None,
    looking: Looking = NOT_LOOKING,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `TinyVLM.forward` gives for the answers of a batch.

    `features` are those of the pictures, if they are encoded already.
    """
    weight = model.model["embed_tokens"].weight
    tokens = torch.from_numpy(batch.tokens).to(weight.device)
    image_rows = None
    if features is None and len(batch.images):
        features = encode(model, batch)
    if features is not None and batch.row_images:
        image_rows = model.visual.merge(features[: batch.row_images])
    return model(
        tokens,
        torch.from_numpy(batch.positions).to(weight.device),
        torch.from_numpy(batch.blocks).to(weight.device),
        tokens == encoder.image_pad,
        image_rows,
        torch.from_numpy(batch.labels >= 0).to(weight.device),
        looking,
    )


def encode(model: TinyVLM, batch: Batch) -> torch.Tensor:
    """Patch features `[N, P, vision_dim]` of all pictures of a batch."""
    weight = model.model["embed_tokens"].weight
    patches = to_patches(batch.images, weight.dtype).to(weight.device)
    return model.visual.encode(
        patches, batch.images.shape[1] // PATCH, batch.images.shape[2] // PATCH
    )


def block_scores(model: TinyVLM, batch: Batch, encoder: Encoder) -> list[dict[int, Score]]:
    """For each row, by block: whether its answers are right to the last token, and how likely."""
    labels = torch.from_numpy(batch.labels)
    asked = labels >= 0
    with torch.no_grad():
        hidden, _ = forward(model, batch, encoder)
        log_probabilities = model.logits(hidden).log_softmax(-1).cpu()
    wanted = labels[asked]
    right = np.ones(batch.labels.shape, dtype=bool)
    likelihood = np.zeros(batch.labels.shape, dtype=np.float64)
    right[asked.numpy()] = (log_probabilities.argmax(-1) == wanted).numpy()
    likelihood[asked.numpy()] = log_probabilities.gather(1, wanted[:, None])[:, 0].numpy()
    result = []
    for row, blocks in enumerate(batch.blocks):
        where = asked[row].numpy()
        row_scores = {}
        for block in set(blocks[where]):
            mine = blocks == block
            score = Score(bool(right[row][mine].all()), float(likelihood[row][mine].sum()))
            row_scores[int(block)] = score
        result.append(row_scores)
    return result


def watch_set(
    assets: Assets, encoder: Encoder, batches: int, rows: int
) -> list[tuple[Batch, list[list[str]]]]:
    """Fixed batches of unseen pictures with the kinds of their questions."""
    result = []
    sizes = [size for size in MIX if size[0] * size[1] <= 168 * 168]
    for number in range(batches):
        rng = Random(f"watch/{number}")
        size = rng.choices(sizes, [MIX[s][0] for s in sizes])[0]
        grid = (size[0] // 28, size[1] // 28)
        built: list[Row] = []
        images, kinds = [], []
        while len(built) < rows:
            picture = draw(rng, assets, choose_type(rng, size), size)
            if picture.questions:
                asked = picture.questions[:9]
                built.append(encoder.prefix_row(grid, asked))
                images.append(picture.pixels)
                kinds.append([item.kind for item in asked])
        result.append((_padded(built, images, size, encoder.pad), kinds))
    return result


def tally(
    model: TinyVLM, batches: list[tuple[Batch, list[list[str]]]], encoder: Encoder
) -> dict[str, Tally]:
    """Right answers by kind over a watch set."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for batch, kinds in batches:
        for row_kinds, blocks in zip(kinds, block_scores(model, batch, encoder), strict=True):
            for number, kind in enumerate(row_kinds, start=1):
                counts[kind][0] += blocks[number].is_right
                counts[kind][1] += 1
    return {kind: Tally(*pair) for kind, pair in sorted(counts.items())}
