"""Samples laid end to end for our graphs, and pictures encoded once (for `pipeline`, `tuning`).

A batch is a flat row of tokens without a cache, so gradients flow. Sequences of one length stand
together: the attention op runs them as one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mgvq_quantizer.calibration import Sample
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput

Item = TypeVar("Item")

MAX_TOKENS = 8192
"""Tokens of one forward without gradients, at least one sample."""
_MAX_PATCHES = 4096
"""Patches encoded in one forward of the vision tower, at least one picture."""

Features = dict[int, Tensor]
"""Decoder rows `[N, D]` of each picture, by `id` of its `ImageInput`."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some samples, end to end."""

    samples: tuple[Sample, ...]
    token_ids: Tensor
    """`[T]` int64."""
    forward: ForwardBatch
    answer_rows: Tensor
    """`[A]` int64: the rows whose next token is part of an answer, sample by sample."""


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many of some items, drawn evenly, in their order."""
    count = min(len(items), most)
    return [items[int(i * (len(items) / count))] for i in range(count)]


def make_batch(samples: Sequence[Sample], device: torch.device | str) -> TokenBatch:
    """Lay samples end to end, shortest first."""
    ordered = tuple(sorted(samples, key=lambda sample: len(sample.token_ids)))
    lengths = [len(sample.token_ids) for sample in ordered]
    positions = np.concatenate([sample.positions for sample in ordered], axis=1)  # [3, T]
    is_answer = np.concatenate([sample.is_answer for sample in ordered])  # [T]
    ids = np.concatenate([sample.token_ids for sample in ordered])
    return TokenBatch(
        samples=ordered,
        token_ids=torch.from_numpy(ids).to(device),
        forward=ForwardBatch(torch.from_numpy(positions).to(device), (0, *accumulate(lengths))),
        answer_rows=torch.from_numpy(np.flatnonzero(is_answer) - 1).to(device),
    )


def split_batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Cut samples, in their order, into runs of at most `max_tokens` tokens, at least one."""
    batches: list[list[Sample]] = []
    room = 0
    for sample in samples:
        length = len(sample.token_ids)
        if length > room or not batches:
            batches.append([])
            room = max_tokens
        batches[-1].append(sample)
        room -= length
    return batches


def deal(samples: Sequence[Sample], steps: int, max_tokens: int, seed: int) -> list[list[Sample]]:
    """Return a batch for each of some steps: `split_batches` of all samples, shuffled anew each
    time that they are used up."""
    rng = np.random.default_rng(seed)
    batches: list[list[Sample]] = []
    left: list[list[Sample]] = []
    for _ in range(steps):
        if not left:
            shuffled = [samples[i] for i in rng.permutation(len(samples))]
            left = split_batches(shuffled, max_tokens)
        batches.append(left.pop())
    return batches


def length_batches(samples: Sequence[Sample], device: torch.device) -> list[TokenBatch]:
    """Return all samples in batches of like lengths, the shortest first."""
    ordered = sorted(samples, key=lambda sample: len(sample.token_ids))
    return [make_batch(part, device) for part in split_batches(ordered, MAX_TOKENS)]


def picture_batches(pictures: Sequence[ImageInput]) -> Iterator[list[ImageInput]]:
    """Cut pictures into runs that the vision tower takes at once."""
    batch: list[ImageInput] = []
    patches = 0
    for picture in pictures:
        if batch and patches + len(picture.patches) > _MAX_PATCHES:
            yield batch
            batch, patches = [], 0
        batch.append(picture)
        patches += len(picture.patches)
    if batch:
        yield batch


def unique_pictures(samples: Sequence[Sample]) -> list[ImageInput]:
    """Return every picture of some samples once, smallest grids first."""
    pictures = {id(image): image for sample in samples for image in sample.images}
    return sorted(pictures.values(), key=lambda picture: picture.grid_thw)


def patches_of(pictures: Sequence[ImageInput], device: torch.device | str) -> Tensor:
    """Return the patches `[P, C*T*p*p]` of pictures, end to end."""
    return torch.from_numpy(np.concatenate([p.patches for p in pictures])).float().to(device)


def encode_batch(
    model: CausalLM, pictures: Sequence[ImageInput], device: torch.device | str
) -> Tensor:
    """Return the decoder rows `[N, D]` of pictures, end to end, in one forward."""
    grids = [picture.grid_thw for picture in pictures]
    layouts = [picture.layout for picture in pictures]
    return model.encode_images(patches_of(pictures, device), grids, layouts)


@torch.no_grad()
def encode_pictures(
    model: CausalLM, pictures: Sequence[ImageInput], device: torch.device | str
) -> Features:
    """Run every picture through the vision tower once."""
    features: Features = {}
    for batch in picture_batches(pictures):
        rows = encode_batch(model, batch, device)  # [N, D]
        split = torch.split(rows, [picture.num_tokens for picture in batch])
        features.update({id(p): part for p, part in zip(batch, split, strict=True)})
    return features


def embed(model: CausalLM, batch: TokenBatch, features: Features) -> Tensor:
    """Return the decoder's input `[T, D]`: token rows, with picture rows in their places."""
    rows = model.embed(batch.token_ids)  # [T, D]
    pictures = [features[id(image)] for sample in batch.samples for image in sample.images]
    if not pictures or model.config.image_token_id is None:
        return rows
    places = (batch.token_ids == model.config.image_token_id).nonzero()  # [N, 1]
    values = torch.cat(pictures).to(rows.dtype)  # [N, D]
    return rows.scatter(0, places.expand(-1, rows.shape[1]), values)


def decoder_runs(
    model: CausalLM, batches: Sequence[TokenBatch], features: Features
) -> list[Callable[[], Tensor]]:
    """Return one forward of the decoder a batch, to be run at will; each gives `[T, D]`.

    Their inputs are what the model's token table holds now.
    """
    return [partial(model, embed(model, batch, features), batch.forward) for batch in batches]
