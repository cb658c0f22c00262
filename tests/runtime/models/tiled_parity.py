"""What every family whose pictures are cut into tiles has to pass (used by its parity test).

A family's own file has its tiny models, its cases and what transformers says to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput
from tests.runtime.models.families import IMAGE
from tests.runtime.models.paged import PagedRunner, Running, start_with_images

TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """A prompt with its pictures."""

    ids: list[int]
    images: tuple[ImageInput, ...]
    pictures: list[Image.Image]


Expected = Callable[[Case, tuple[int, ...]], torch.Tensor]
"""Logits `[T, V]` of transformers for a case and further tokens."""


def start(model: CausalLM, case: Case) -> Running:
    return start_with_images(model, case.ids, case.images)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 1.0  # not a comparison of zeros
    worst = float((ours - theirs).abs().max())
    print(f"max |difference| {worst:.2e}")
    return worst


def check_prefill(model: CausalLM, case: Case, expected: Expected) -> None:
    sequence = start(model, case)
    hidden = model(sequence.embeds, ForwardBatch.of_sequence(sequence.positions))
    assert difference(model.logits(hidden), expected(case, ())) <= TOLERANCE


def check_paged(model: CausalLM, case: Case, expected: Expected) -> None:
    """Prompt in chunks (some end inside a picture), then token by token."""
    new_ids = (17, 401, 3, 99)
    sequence, runner = start(model, case), PagedRunner(model)
    parts = []
    while sequence.num_done < len(case.ids):
        parts += runner.step([(sequence, min(11, len(case.ids) - sequence.num_done))])
    for token in new_ids:
        sequence.append(model, token)
        parts += runner.step([(sequence, 1)])
    assert difference(torch.cat(parts), expected(case, new_ids)) <= TOLERANCE


def check_mixed(model: CausalLM, cases: Mapping[str, Case], expected: Expected) -> None:
    """Decoding, a whole prompt and a chunk that ends inside a picture, in one forward."""
    runner = PagedRunner(model)
    names = ("one-image-first", "text", "two-images")
    decoding, whole, chunked = (start(model, cases[name]) for name in names)
    runner.step([(decoding, len(decoding.ids)), (chunked, 5)])
    decoding.append(model, 42)
    logits = runner.step([(decoding, 1), (whole, len(whole.ids)), (chunked, 6)])
    assert cases["two-images"].ids[10] == cases["two-images"].ids[11] == IMAGE
    wanted = [
        expected(cases["one-image-first"], (42,))[-1:],
        expected(cases["text"], ()),
        expected(cases["two-images"], ())[5:11],
    ]
    for ours, theirs in zip(logits, wanted, strict=True):
        assert difference(ours, theirs) <= TOLERANCE


def check_encoding(model: CausalLM, images: Sequence[ImageInput]) -> None:
    """Pictures matter, and are encoded alone as they are together."""
    patches = torch.cat([torch.from_numpy(image.patches) for image in images])
    grids, layouts = [i.grid_thw for i in images], [i.layout for i in images]
    together = model.encode_images(patches, grids, layouts)
    alone = [
        model.encode_images(torch.from_numpy(i.patches), [i.grid_thw], [i.layout]) for i in images
    ]
    assert [len(part) for part in alone] == [image.num_tokens for image in images]
    assert difference(torch.cat(alone), together) <= 1e-5
    assert (model.encode_images(patches.flip(0), grids, layouts) - together).abs().max() > 1e-2
