"""Which requests run in the next step, and how many tokens of each (called by `Engine.step`).

Decodes first, one token each; what is left of the budget goes to prompts, oldest first, in chunks
that may end anywhere, also inside a picture, but not past one whose turn to be encoded has not
come. A prompt is admitted when the pool holds all of it, what it shares with earlier ones counted
once, and when what it can share is there, so that prompts of one beginning that come together read
it once. So only decodes ask for blocks while they run; when there are none, the newest request
gives its own back and starts over later (its tokens and text stay). Requests of a lower priority
number count as older than all others. Guessed tokens get what budget and blocks nobody else wants
in this step; blocks of a wrong guess are given back before the next. No torch here and no text;
what a picture's embeddings are is nobody's business here.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Any

from mgvq_runtime.cache.block_key import BlockKey
from mgvq_runtime.cache.block_manager import BlockManager
from mgvq_runtime.cache.lru import LRUCache
from mgvq_runtime.engine.sequence import ImageKey, Sequence
from mgvq_runtime.request import ImageInput

_ORDER = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of one sequence and of what is guessed to follow, to be run now."""

    sequence: Sequence
    start: int
    end: int
    is_sampled: bool
    """Whether the chunk reaches the last known token, so that the next one is drawn from it."""
    draft: tuple[int, ...] = ()
    """The guessed ones among its tokens, its last; what follows is drawn from each of them too."""

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, those of the draft included."""
        return [*self.sequence.token_ids[self.start : self.end], *self.draft]

    @property
    def num_rows(self) -> int:
        """How many of its last tokens something is drawn from."""
        return min(1 + len(self.draft), self.end - self.start) if self.is_sampled else 0

    def tokens(self) -> Iterator[Chunk]:
        """Yield chunks of one token each, in order, that come to the same."""
        first_drawn, first_guessed = self.end - self.num_rows, self.end - len(self.draft)
        for index, token_id in enumerate(self.token_ids, self.start):
            draft = (token_id,) if index >= first_guessed else ()
            yield Chunk(self.sequence, index, index + 1, index >= first_drawn, draft)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step does."""

    chunks: list[Chunk]
    """To be run in one forward, each sequence at most once."""
    images: dict[ImageKey, ImageInput]
    """To be encoded before it, each picture once."""


class Scheduler:
    """Ordered admission, decode-first budget, LIFO preemption by recompute."""

    def __init__(
        self,
        blocks: BlockManager,
        image_cache: LRUCache[ImageKey, Any],
        max_num_seqs: int,
        max_batch_tokens: int,
        max_batch_patches: int,
    ) -> None:
        """Schedule over a pool of blocks.

        Args:
            blocks: The pool.
            image_cache: Embeddings of pictures; what is in it is not encoded again.
            max_num_seqs: Most requests that run at the same time.
            max_batch_tokens: Most tokens of a step.
            max_batch_patches: Most patches encoded in a step; its first picture may have more.
        """
        if max_batch_tokens < max_num_seqs:
            raise ValueError(
                f"max_batch_tokens ({max_batch_tokens}) is less than max_num_seqs ({max_num_seqs})"
            )
        self.blocks = blocks
        self.image_cache = image_cache
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_patches = max_batch_patches
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Both in order of priority, then of arrival."""
        self.num_preemptions = 0
        self._arrivals = count()

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
        sequence.order = (sequence.request.priority, next(self._arrivals))
        insort(self.waiting, sequence, key=_ORDER)

    def schedule(self) -> Step:
        """Return what the next step does; blocks are allocated."""
        step = Step([], {})
        is_short = self._schedule_decodes(step)
        budget = self.max_batch_tokens - len(step.chunks)
        for sequence in self.running:
            if budget > 0 and not sequence.is_decoding:
                budget -= self._schedule_prefill(sequence, budget, step)
        while budget > 0 and not is_short and (newcomer := self._admit()):
            budget -= self._schedule_prefill(newcomer, budget, step)
        self._schedule_drafts(step, budget)
        return step

    def advance(self, sequence: Sequence, end: int) -> None:
        """Note that keys and values up to token `end` are written: full blocks can be found now.

        Args:
            sequence: One that runs.
            end: One past the last of its known tokens that was run; no guess is among them.
        """
        size = self.blocks.block_size
        first, last = sequence.num_computed // size, end // size
        sequence.advance(end - sequence.num_computed)
        keys = sequence.block_keys(first, last, size)
        for block, key in zip(sequence.block_table[first:last], keys, strict=True):
            self.blocks.register(block, key)

    def remove(self, sequence: Sequence, is_poisoned: bool = False) -> None:
        """Forget a sequence, waiting or running, and free its blocks.

        Args:
            sequence: One that was added and not removed.
            is_poisoned: Whether nobody may find its blocks and pictures any more.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if is_poisoned:
            self.blocks.forget(sequence.block_table)
            for index in range(len(sequence.request.prompt.images)):
                self.image_cache.discard(sequence.image_key(index))
        self.blocks.release(sequence.block_table)
        sequence.reset()

    def _schedule_decodes(self, step: Step) -> bool:
        """Give one token to each sequence past its prompt; return whether blocks ran out."""
        for sequence in self.running:
            if sequence.proposer is not None:  # what a wrong guess was to fill
                self.blocks.release(sequence.block_table, len(sequence.token_ids))
        is_short = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if not sequence.is_decoding:
                continue
            num_tokens = len(sequence.token_ids)
            while not self.blocks.allocate(sequence.block_table, num_tokens):
                is_short = True
                if self._preempt_newest() is sequence:
                    break
            else:
                step.chunks.append(Chunk(sequence, num_tokens - 1, num_tokens, is_sampled=True))
        return is_short

    def _schedule_prefill(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Append the next chunk of a prompt and return its length, 0 if its picture must wait."""
        start = sequence.num_computed
        end = min(len(sequence.token_ids), start + budget)
        for index in sequence.images_between(start, end):
            if not self._get_image(sequence, index, step):
                end = max(start, sequence.image_start(index))
                break
        if end > start:
            is_sampled = end == len(sequence.token_ids)
            step.chunks.append(Chunk(sequence, start, end, is_sampled))
        return end - start

    def _schedule_drafts(self, step: Step, budget: int) -> None:
        """Let decodes run what is guessed to follow, as far as nothing has to give way for it."""
        for row, chunk in enumerate(step.chunks):
            sequence = chunk.sequence
            if sequence.proposer is None or not sequence.is_decoding:
                continue
            limit = min(budget, sequence.max_draft_tokens)
            draft = sequence.proposer.propose(sequence.token_ids, limit)
            end = chunk.end + len(draft)
            if draft and self.blocks.allocate(sequence.block_table, end):
                step.chunks[row] = Chunk(sequence, chunk.start, end, True, draft)
                budget -= len(draft)

    def _get_image(self, sequence: Sequence, index: int, step: Step) -> bool:
        """Find a picture's embeddings, or plan to encode it; False where it must wait."""
        if index in sequence.image_embeds:
            return True
        key = sequence.image_key(index)
        embeds = self.image_cache.get(key)
        if embeds is not None:
            sequence.image_embeds[index] = embeds
        elif key not in step.images:
            image = sequence.request.prompt.images[index]
            num_patches = sum(image.num_patches for image in (*step.images.values(), image))
            if step.images and num_patches > self.max_batch_patches:
                return False
            step.images[key] = image
        return True

    def _admit(self) -> Sequence | None:
        """Let the head of the queue run if the pool holds all its tokens; None if not.

        One whose next block a running prompt is about to fill waits, and shares it then.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        sequence, size = self.waiting[0], self.blocks.block_size
        num_tokens = len(sequence.token_ids)
        # The last token is always run: somebody must say what follows it.
        keys = list(sequence.block_keys(0, (num_tokens - 1) // size, size))
        cached = self.blocks.find(keys)
        if self._is_being_computed(keys, len(cached)):
            return None
        # One spare block a running request, or the newcomer would soon be preempted again.
        if not self.blocks.has_room(cached, num_tokens, len(self.running)):
            return None
        self.blocks.share(sequence.block_table, cached)
        self.blocks.allocate(sequence.block_table, num_tokens)
        sequence.num_computed = len(cached) * size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
        insort(self.running, self.waiting.pop(0), key=_ORDER)
        return sequence

    def _is_being_computed(self, keys: list[BlockKey], index: int) -> bool:
        """Say whether somebody runs who has all tokens of block `keys[index]` and will fill it."""
        size = self.blocks.block_size
        return index < len(keys) and any(
            keys[index] in sequence.block_keys(index, index + 1, size)
            for sequence in self.running
            if sequence.num_computed < (index + 1) * size <= len(sequence.token_ids)
        )

    def _preempt_newest(self) -> Sequence:
        sequence = self.running.pop()
        self.blocks.release(sequence.block_table)
        sequence.reset()
        insort(self.waiting, sequence, key=_ORDER)
        self.num_preemptions += 1
        return sequence
