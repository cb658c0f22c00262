"""Many questions on few pictures in two forwards: common prompts first, then the rest.

Called by `evaluate`. Keys and values of what a group of prompts has in common are written once into
a small paged cache (`paged_runs`); the block table of every question of the group begins with those
blocks. Runs of one shape stand together, so that attention runs them as one call.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgvq_quantizer.batches import encode_pictures
from mgvq_quantizer.paged_runs import (
    BLOCK,
    Laid,
    Run,
    lay_out,
    make_cache,
    picture_rows,
    run_through,
)
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput, Prompt


@dataclass(frozen=True, eq=False)
class Asked:
    """One question in tokens."""

    kind: str
    prompt: Prompt
    """Prompts about the same pictures hold the same `ImageInput` objects."""
    answer: tuple[int, ...]
    """Answer tokens and the end token."""


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions laid out for two forwards."""

    asked: tuple[Asked, ...]
    """In the order of the answer rows."""
    targets: Tensor
    """`[A]` int64: all answer tokens, end to end."""
    answer_rows: Tensor
    """`[A]` int64: rows of the second forward that predict them."""
    pictures: tuple[ImageInput, ...]
    prefixes: Laid | None
    rests: Laid
    num_blocks: int


def make_exam(
    asked: Sequence[Asked], image_token_id: int | None, device: torch.device | str = "cpu"
) -> Exam:
    """Lay questions out so that each group's common prompt runs once.

    Args:
        asked: questions; those with the same pictures form a group.
        image_token_id: the placeholder; answers never hold it. None for text alone.
        device: where the index tensors go.
    """
    groups: dict[tuple[int, ...], list[Asked]] = {}
    for question in asked:
        key = tuple(id(image) for image in question.prompt.images)
        groups.setdefault(key, []).append(question)
    prefixes: list[Run] = []
    rests: list[tuple[Asked, Run]] = []
    pictures: list[ImageInput] = []
    num_blocks = num_rows = 0
    for group in groups.values():
        common = _common_length(group)
        shared = list(range(num_blocks, num_blocks + common // BLOCK))
        num_blocks += len(shared)
        for i, question in enumerate(group):
            ids, positions = _whole(question)
            rows = picture_rows(ids, image_token_id, num_rows)
            if i == 0 and common:
                head = slice(0, common)
                prefixes.append(Run(ids[head], rows[head], positions[:, head], common, shared))
            own = -(-len(ids) // BLOCK) - len(shared)
            blocks = [*shared, *range(num_blocks, num_blocks + own)]
            num_blocks += own
            tail = slice(common, None)
            run = Run(ids[tail], rows[tail], positions[:, tail], len(ids), blocks)
            rests.append((question, run))
        pictures += group[0].prompt.images
        num_rows += sum(image.num_tokens for image in group[0].prompt.images)
    prefixes.sort(key=lambda run: run.shape)
    rests.sort(key=lambda pair: pair[1].shape)
    ends = list(accumulate(len(run.token_ids) for _, run in rests))
    answer_rows = [
        np.arange(end - len(question.answer), end)
        for end, (question, _) in zip(ends, rests, strict=True)
    ]
    return Exam(
        asked=tuple(question for question, _ in rests),
        targets=torch.tensor([token for question, _ in rests for token in question.answer]),
        answer_rows=torch.from_numpy(np.concatenate(answer_rows)).to(device),
        pictures=tuple(pictures),
        prefixes=lay_out(prefixes, device) if prefixes else None,
        rests=lay_out([run for _, run in rests], device),
        num_blocks=num_blocks,
    )


@torch.no_grad()
def answer_states(model: CausalLM, exam: Exam) -> Tensor:
    """Return the final hidden states `[A, D]` of the rows that predict the answers."""
    parameter = next(model.parameters())
    features = encode_pictures(model, exam.pictures, parameter.device)
    rows = [features[id(picture)] for picture in exam.pictures]
    pictures = torch.cat(rows) if rows else parameter.new_zeros(0, 0)
    cache = make_cache(model, exam.num_blocks)
    if exam.prefixes is not None:
        run_through(model, exam.prefixes, pictures, cache)
    return run_through(model, exam.rests, pictures, cache)[exam.answer_rows]


def _common_length(group: Sequence[Asked]) -> int:
    """Return how many tokens all prompts begin with, in whole blocks; each keeps one of its own."""
    prompts = [question.prompt.token_ids for question in group]
    common = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    return common // BLOCK * BLOCK


def _whole(question: Asked) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return tokens `[T]` and positions `[3, T]` of prompt and answer, the end token left out."""
    prompt = question.prompt
    ids = np.array([*prompt.token_ids, *question.answer[:-1]], dtype=np.int64)
    tail = np.arange(len(prompt.token_ids), len(ids)) + prompt.position_delta
    return ids, np.concatenate([prompt.positions, np.tile(tail, (3, 1))], axis=1)
