"""Through blocks one after another, all runs through one before the next (called by `stream`,
`survey`, `teacher`, `gradients`).

A block is in use while a loop over its list looks at it and not longer: with the lists of
`residence` only that block's parameters are in memory. So every pass is a loop over blocks, also
backwards. Not here: where calls come from (`statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from mgvq_quantizer.statistics import Calls, Run, next_call
from mgvq_runtime.models.causal_lm import CausalLM


def walk_blocks(
    blocks: nn.ModuleList,
    calls: Calls,
    visit: Callable[[int, Sequence[Run]], None] | None = None,
) -> Calls:
    """Go through blocks; each is called with what the changed ones before it produce.

    Args:
        blocks: called one after another.
        calls: arguments of the first block, one tuple a run.
        visit: given a block's number and its runs; may change its weights.

    Returns:
        The calls that would enter one more block.
    """
    for i, block in enumerate(blocks):
        if visit is not None:
            visit(i, [partial(block, *call) for call in calls])
        calls = [next_call(call, block(*call)) for call in calls]
    return calls


def backwards(blocks: nn.ModuleList) -> Iterator[tuple[int, nn.Module]]:
    """Yield number and block, the last one first, each in use until the next is asked for."""
    for i in reversed(range(len(blocks))):
        for block in blocks[i : i + 1]:
            yield i, block


def answer_states(model: CausalLM, x: Tensor, residual: Tensor, answer_rows: Tensor) -> Tensor:
    """Return what enters the head in the answer rows `[A, D]`, from what leaves the last block.

    Args:
        model: its norm is used.
        x: `[T, D]`: the last block's output.
        residual: `[T, D]`: the stream it is to be added to.
        answer_rows: `[A]` int64.
    """
    return model.model.norm.add(x, residual)[0][answer_rows]
