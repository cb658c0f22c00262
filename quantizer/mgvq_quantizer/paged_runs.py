"""Runs of tokens through a small paged cache (for `shared_prefix`, `own_answers`).

It is the engine's attention path without its scheduler: keys and values of what was read stay in
blocks, and a run goes on behind what its blocks hold. Who shares blocks with whom, and which tokens
come next, is the callers' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.models.causal_lm import CausalLM

BLOCK = 16
"""Tokens of a block of the cache."""


@dataclass(eq=False)
class Run:
    """A run of tokens behind `context - len(token_ids)` tokens that are in the cache already."""

    token_ids: npt.NDArray[np.int64]
    """`[T]`."""
    picture_rows: npt.NDArray[np.int64]
    """`[T]`: which row of all pictures a placeholder takes; -1 for text."""
    positions: npt.NDArray[np.int64]
    """`[3, T]`."""
    context: int
    """Tokens up to its end."""
    blocks: list[int]
    """Those of all `context` tokens, in order; more may follow."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return its length and its context: attention runs neighbours of one shape as one call."""
        return len(self.token_ids), self.context


@dataclass(frozen=True, eq=False)
class Laid:
    """The tokens of one forward, and where their keys and values go."""

    token_ids: Tensor
    """`[T]` int64."""
    picture_rows: Tensor
    """`[T]` int64, as in `Run`."""
    positions: Tensor
    """`[3, T]` int64."""
    cu_seqlens_q: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_table: Tensor
    slot_mapping: Tensor


def make_cache(model: CausalLM, num_blocks: int) -> list[LayerCache]:
    """Return an empty cache of so many blocks, beside the model and of its type."""
    text, like = model.config.text_config, next(model.parameters())
    shape = (num_blocks, BLOCK, text.num_key_value_heads, text.head_dim)
    return [
        LayerCache(like.new_zeros(shape), like.new_zeros(shape))
        for _ in range(text.num_hidden_layers)
    ]


def picture_rows(
    ids: npt.NDArray[np.int64], image_token_id: int | None, first: int
) -> npt.NDArray[np.int64]:
    """Return which row of all pictures each placeholder takes, -1 for text: `[T]`.

    Args:
        ids: `[T]`.
        image_token_id: the placeholder; None for text alone.
        first: row of the first of them.
    """
    is_picture = ids == image_token_id
    return np.where(is_picture, first + np.cumsum(is_picture) - 1, -1)


def lay_out(runs: Sequence[Run], device: torch.device | str) -> Laid:
    """Lay runs end to end."""
    lengths = [len(run.token_ids) for run in runs]
    widest = max(len(run.blocks) for run in runs)
    table = np.zeros((len(runs), widest), dtype=np.int32)
    slots = []
    for i, run in enumerate(runs):
        table[i, : len(run.blocks)] = run.blocks
        places = np.arange(run.context - lengths[i], run.context)
        slots.append(table[i].astype(np.int64)[places // BLOCK] * BLOCK + places % BLOCK)
    arrays = [
        np.concatenate([run.token_ids for run in runs]),
        np.concatenate([run.picture_rows for run in runs]),
        np.concatenate([run.positions for run in runs], axis=1),
        table,
        np.concatenate(slots),
    ]
    ids, rows, positions, blocks, mapping = (torch.from_numpy(a).to(device) for a in arrays)
    return Laid(
        token_ids=ids,
        picture_rows=rows,
        positions=positions,
        cu_seqlens_q=(0, *accumulate(lengths)),
        context_lens=tuple(run.context for run in runs),
        block_table=blocks,
        slot_mapping=mapping,
    )


def run_through(
    model: CausalLM, laid: Laid, pictures: Tensor, cache: Sequence[LayerCache]
) -> Tensor:
    """Run tokens, and write their keys and values into the cache.

    Args:
        model: in dense arithmetic.
        laid: the tokens.
        pictures: `[N, D]`: rows of all pictures, end to end.
        cache: of `make_cache`.

    Returns:
        The final hidden states `[T, D]`.
    """
    embeds = model.embed(laid.token_ids)  # [T, D]
    places = (laid.picture_rows >= 0).nonzero()[:, 0]
    if len(places):
        embeds[places] = pictures[laid.picture_rows[places]].to(embeds.dtype)
    batch = ForwardBatch(
        laid.positions,
        laid.cu_seqlens_q,
        laid.context_lens,
        laid.block_table,
        laid.slot_mapping,
        cache,
    )
    return model(embeds, batch)
