"""Many questions on few pictures in two forwards: common prompts first, then the rest.

Called by `evaluate`. Keys and values of what a group of prompts has in common are written once into
a small paged cache; the block table of every question of the group begins with those blocks. It is
the engine's attention path without its scheduler. Requests of one shape stand together, so that
attention runs them as one call.
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
from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput, Prompt

_BLOCK = 16


@dataclass(frozen=True, eq=False)
class Asked:
    """One question in tokens."""

    kind: str
    prompt: Prompt
    """Prompts about the same pictures hold the same `ImageInput` objects."""
    answer: tuple[int, ...]
    """Answer tokens and the end token."""


@dataclass(frozen=True, eq=False)
class _Half:
    """The tokens of one of the two forwards, and where their keys and values go."""

    token_ids: Tensor
    """`[T]` int64."""
    picture_rows: Tensor
    """`[T]` int64: which row of the exam's pictures a placeholder takes; -1 for text."""
    positions: Tensor
    cu_seqlens_q: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_table: Tensor
    slot_mapping: Tensor


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
    prefixes: _Half | None
    rests: _Half
    num_blocks: int


@dataclass(eq=False)
class _Request:
    """A run of tokens behind `context - len(token_ids)` tokens that are in the cache already."""

    token_ids: npt.NDArray[np.int64]
    picture_rows: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    context: int
    blocks: list[int]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.token_ids), self.context


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
    prefixes: list[_Request] = []
    rests: list[tuple[Asked, _Request]] = []
    pictures: list[ImageInput] = []
    num_blocks = num_rows = 0
    for group in groups.values():
        common = _common_length(group)
        shared = list(range(num_blocks, num_blocks + common // _BLOCK))
        num_blocks += len(shared)
        for i, question in enumerate(group):
            ids, positions = _whole(question)
            rows = _picture_rows(ids, image_token_id, num_rows)
            if i == 0 and common:
                head = slice(0, common)
                prefixes.append(_Request(ids[head], rows[head], positions[:, head], common, shared))
            own = -(-len(ids) // _BLOCK) - len(shared)
            blocks = [*shared, *range(num_blocks, num_blocks + own)]
            num_blocks += own
            tail = slice(common, None)
            request = _Request(ids[tail], rows[tail], positions[:, tail], len(ids), blocks)
            rests.append((question, request))
        pictures += group[0].prompt.images
        num_rows += sum(image.num_tokens for image in group[0].prompt.images)
    prefixes.sort(key=lambda request: request.shape)
    rests.sort(key=lambda pair: pair[1].shape)
    ends = list(accumulate(len(request.token_ids) for _, request in rests))
    answer_rows = [
        np.arange(end - len(question.answer), end)
        for end, (question, _) in zip(ends, rests, strict=True)
    ]
    return Exam(
        asked=tuple(question for question, _ in rests),
        targets=torch.tensor([token for question, _ in rests for token in question.answer]),
        answer_rows=torch.from_numpy(np.concatenate(answer_rows)).to(device),
        pictures=tuple(pictures),
        prefixes=_lay_out(prefixes, device) if prefixes else None,
        rests=_lay_out([request for _, request in rests], device),
        num_blocks=num_blocks,
    )


@torch.no_grad()
def answer_states(model: CausalLM, exam: Exam) -> Tensor:
    """Return the final hidden states `[A, D]` of the rows that predict the answers."""
    parameter = next(model.parameters())
    features = encode_pictures(model, exam.pictures, parameter.device)
    rows = [features[id(picture)] for picture in exam.pictures]
    pictures = torch.cat(rows) if rows else parameter.new_zeros(0, 0)
    text = model.config.text_config
    shape = (exam.num_blocks, _BLOCK, text.num_key_value_heads, text.head_dim)
    cache = [
        LayerCache(parameter.new_zeros(shape), parameter.new_zeros(shape))
        for _ in range(text.num_hidden_layers)
    ]
    if exam.prefixes is not None:
        _forward(model, exam.prefixes, pictures, cache)
    return _forward(model, exam.rests, pictures, cache)[exam.answer_rows]


def _forward(model: CausalLM, half: _Half, pictures: Tensor, cache: list[LayerCache]) -> Tensor:
    embeds = model.embed(half.token_ids)  # [T, D]
    places = (half.picture_rows >= 0).nonzero()[:, 0]
    if len(places):
        embeds[places] = pictures[half.picture_rows[places]].to(embeds.dtype)
    batch = ForwardBatch(
        half.positions,
        half.cu_seqlens_q,
        half.context_lens,
        half.block_table,
        half.slot_mapping,
        cache,
    )
    return model(embeds, batch)


def _lay_out(requests: Sequence[_Request], device: torch.device | str) -> _Half:
    lengths = [len(request.token_ids) for request in requests]
    widest = max(len(request.blocks) for request in requests)
    table = np.zeros((len(requests), widest), dtype=np.int32)
    slots = []
    for i, request in enumerate(requests):
        table[i, : len(request.blocks)] = request.blocks
        places = np.arange(request.context - lengths[i], request.context)
        slots.append(table[i].astype(np.int64)[places // _BLOCK] * _BLOCK + places % _BLOCK)
    arrays = [
        np.concatenate([request.token_ids for request in requests]),
        np.concatenate([request.picture_rows for request in requests]),
        np.concatenate([request.positions for request in requests], axis=1),
        table,
        np.concatenate(slots),
    ]
    ids, rows, positions, blocks, mapping = (torch.from_numpy(a).to(device) for a in arrays)
    return _Half(
        token_ids=ids,
        picture_rows=rows,
        positions=positions,
        cu_seqlens_q=(0, *accumulate(lengths)),
        context_lens=tuple(request.context for request in requests),
        block_table=blocks,
        slot_mapping=mapping,
    )


def _common_length(group: Sequence[Asked]) -> int:
    """Return how many tokens all prompts begin with, in whole blocks; each keeps one of its own."""
    prompts = [question.prompt.token_ids for question in group]
    common = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    return common // _BLOCK * _BLOCK


def _whole(question: Asked) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return tokens `[T]` and positions `[3, T]` of prompt and answer, the end token left out."""
    prompt = question.prompt
    ids = np.array([*prompt.token_ids, *question.answer[:-1]], dtype=np.int64)
    tail = np.arange(len(prompt.token_ids), len(ids)) + prompt.position_delta
    return ids, np.concatenate([prompt.positions, np.tile(tail, (3, 1))], axis=1)


def _picture_rows(
    ids: npt.NDArray[np.int64], image_token_id: int | None, first: int
) -> npt.NDArray[np.int64]:
    """Return which row of all pictures each placeholder takes, -1 for text: `[T]`."""
    is_picture = ids == image_token_id
    return np.where(is_picture, first + np.cumsum(is_picture) - 1, -1)
