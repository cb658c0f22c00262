"""Which requests run in the next step, and how many tokens of each (called by `Engine.step`).

Decodes first, one token each; what is left of the budget goes to prompts, oldest first, in chunks
that may end anywhere, also inside a picture. A prompt is admitted when the pool holds all of it, so
only decodes ask for blocks while they run; when there are none, the newest request gives its own
back and starts over later (its tokens and text stay). No torch here, no text, no pictures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mgvq_runtime.cache.block_manager import BlockManager
from mgvq_runtime.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of one sequence, to be run in this step."""

    sequence: Sequence
    start: int
    end: int
    is_sampled: bool
    """Whether the chunk reaches the last known token, so that the next one is drawn from it."""


class Scheduler:
    """FIFO admission, decode-first budget, LIFO preemption by recompute."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_batch_tokens: int) -> None:
        """Schedule over a pool of blocks, at most so many requests and tokens a step."""
        if max_batch_tokens < max_num_seqs:
            raise ValueError(
                f"max_batch_tokens ({max_batch_tokens}) is less than max_num_seqs ({max_num_seqs})"
            )
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission, which is the order of arrival."""
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            ValueError: if it could never run to its end in this pool.
        """
        most = sequence.num_prompt_tokens + sequence.max_tokens
        if not sequence.num_prompt_tokens or most > self.blocks.capacity_tokens:
            raise ValueError(
                f"a sequence of {sequence.num_prompt_tokens} prompt tokens and up to "
                f"{sequence.max_tokens} new ones cannot run in {self.blocks.capacity_tokens} tokens"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Return the chunks of the next step, each sequence at most once; blocks are allocated."""
        chunks: list[Chunk] = []
        is_short = self._schedule_decodes(chunks)
        budget = self.max_batch_tokens - len(chunks)
        for sequence in self.running:
            if budget > 0 and sequence.num_remaining > 1:
                budget -= self._schedule_prefill(sequence, budget, chunks)
        while budget > 0 and not is_short and self._admit():
            budget -= self._schedule_prefill(self.running[-1], budget, chunks)
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.block_table)

    def _schedule_decodes(self, chunks: list[Chunk]) -> bool:
        """Give one token to each sequence that lacks just one; return whether blocks ran out."""
        is_short = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence.num_remaining != 1:
                continue
            num_tokens = len(sequence.token_ids)
            while not self.blocks.allocate(sequence.block_table, num_tokens):
                is_short = True
                if self._preempt_newest() is sequence:
                    break
            else:
                chunks.append(Chunk(sequence, num_tokens - 1, num_tokens, is_sampled=True))
        return is_short

    def _schedule_prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Append the next chunk of a prompt and return its length."""
        start = sequence.num_computed
        end = min(len(sequence.token_ids), start + budget)
        chunks.append(Chunk(sequence, start, end, is_sampled=end == len(sequence.token_ids)))
        return end - start

    def _admit(self) -> bool:
        """Move the head of the queue to the running ones if the pool holds all its tokens."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        sequence = self.waiting[0]
        num_tokens = len(sequence.token_ids)
        missing = self.blocks.num_missing_blocks(sequence.block_table, num_tokens)
        # One spare block a running request, or the newcomer would soon be preempted again.
        if missing + len(self.running) > self.blocks.num_free_blocks:
            return False
        self.blocks.allocate(sequence.block_table, num_tokens)
        self.running.append(self.waiting.popleft())
        return True

    def _preempt_newest(self) -> Sequence:
        sequence = self.running.pop()
        self.blocks.release(sequence.block_table)
        sequence.reset()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        return sequence
