"""A pool that remembers what was written, and random histories of requests played over it.

`Simulation` stands in for the engine without a model: each slot of the pool holds the identity of
the whole prefix it was computed from, so that a block shared by mistake is seen at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from mgvq_runtime.cache.block_key import root_digest
from mgvq_runtime.cache.block_manager import DUMMY_BLOCK, BlockManager
from mgvq_runtime.cache.lru import LRUCache
from mgvq_runtime.engine.output import OutputText
from mgvq_runtime.engine.scheduler import Chunk, Scheduler, Step
from mgvq_runtime.engine.sequence import Sequence
from mgvq_runtime.request import ImageInput, Prompt, Request, SamplingParams

PLACEHOLDER = 9
PICTURES = [
    ImageInput(np.full((num_patches, 1), value, np.float32), (1, 1, num_patches), num_tokens)
    for num_patches, num_tokens, value in [(4, 2, 0.0), (4, 2, 1.0), (6, 3, 0.0), (4, 1, 0.0)]
]


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_sequence(
    name: str,
    num_prompt: int | list[int],
    max_tokens: int,
    pictures: tuple[ImageInput, ...] = (),
    salt: str | None = None,
    priority: int = 0,
    proposer: Any = None,
) -> Sequence:
    """A waiting sequence; a number instead of tokens gives a prompt nobody else has."""
    ids = [hash(name) % 1000 + 10] * num_prompt if isinstance(num_prompt, int) else num_prompt
    prompt = Prompt.from_token_ids(ids, pictures)
    request = Request(name, prompt, SamplingParams(), salt, priority)
    output = OutputText(NoText(), request.sampling_params, (), max_tokens)
    root = root_digest(("model",), salt)
    sequence = Sequence(request, max_tokens, 0, (PLACEHOLDER,), output, root)
    sequence.proposer = proposer
    return sequence


def next_token(num_known: int) -> int:
    """What the model would say after so many tokens."""
    return 2 + num_known % 3


@dataclass
class Guesser:
    """Guesses right and wrong by chance, as many tokens as it may and fewer."""

    rng: Random

    def propose(self, token_ids: list[int], limit: int) -> tuple[int, ...]:
        assert limit >= 0
        places = range(len(token_ids), len(token_ids) + self.rng.randint(0, min(limit, 6)))
        return tuple(next_token(place) if self.rng.random() < 0.7 else 5 for place in places)


def make_scheduler(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    image_cache_bytes: int = 0,
    max_batch_patches: int = 1,
) -> Scheduler:
    blocks, images = BlockManager(num_blocks, block_size), LRUCache(image_cache_bytes)
    return Scheduler(blocks, images, max_num_seqs, max_batch_tokens, max_batch_patches)


@dataclass
class Simulation:
    """Plays the engine: runs chunks, appends tokens, ends what has all of its tokens."""

    scheduler: Scheduler
    pool: dict[int, int] = field(default_factory=dict)
    """Slot to the identity of the prefix whose keys and values it holds."""
    num_encoded: int = 0
    num_shared_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0

    def step(self) -> Step:
        waited = {id(sequence) for sequence in self.scheduler.waiting}
        step = self.scheduler.schedule()
        self.check(step, waited)
        self.encode(step)
        admitted = [seq for seq in self.scheduler.running if id(seq) in waited]
        self.num_shared_tokens += sum(seq.num_computed for seq in admitted)
        for chunk in step.chunks:
            self.run(chunk)
            self.scheduler.advance(chunk.sequence, chunk.end - len(chunk.draft))
            if chunk.is_sampled:
                self.draw(chunk)
        return step

    def draw(self, chunk: Chunk) -> None:
        """Take tokens up to the first that was guessed wrong."""
        sequence = chunk.sequence
        for guessed in (*chunk.draft, None):
            sequence.token_ids.append(next_token(len(sequence.token_ids)))
            if sequence.num_completion_tokens == sequence.max_tokens:
                self.scheduler.remove(sequence)
                assert guessed is None, "guessed further than the answer goes"
            elif guessed is not None and guessed == sequence.token_ids[-1]:
                self.scheduler.advance(sequence, len(sequence.token_ids))
                self.num_accepted_tokens += 1
            else:
                self.num_rejected_tokens += guessed is not None
                break

    def check(self, step: Step, waited: set[int]) -> None:
        """Assert what must hold after every decision."""
        scheduler, chunks = self.scheduler, step.chunks
        block_size = scheduler.blocks.block_size
        assert sum(chunk.end - chunk.start for chunk in chunks) <= scheduler.max_batch_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        num_patches = sum(image.num_patches for image in step.images.values())
        assert len(step.images) <= 1 or num_patches <= scheduler.max_batch_patches
        self.check_blocks()
        assert not any(seq.block_table or seq.num_computed for seq in scheduler.waiting)
        admitted = [seq.order for seq in scheduler.running if id(seq) in waited]
        if admitted and scheduler.waiting:
            assert max(admitted) < scheduler.waiting[0].order, "somebody was overtaken"
        for chunk in chunks:
            assert chunk.sequence in scheduler.running
            assert chunk.start == chunk.sequence.num_computed < chunk.end
            num_known = len(chunk.sequence.token_ids)
            assert chunk.is_sampled == (chunk.end == num_known + len(chunk.draft))
            assert not chunk.draft or chunk.start == num_known - 1
            assert len(chunk.token_ids) == chunk.end - chunk.start
            assert len(chunk.sequence.block_table) == -(-max(chunk.end, num_known) // block_size)

    def check_blocks(self) -> None:
        """Count users of every block again, from the tables."""
        blocks = self.scheduler.blocks
        tables = [seq.block_table for seq in self.scheduler.running]
        assert all(len(set(table)) == len(table) for table in tables)
        users = Counter(block for table in tables for block in table)
        assert DUMMY_BLOCK not in users
        assert all(blocks._num_users[b] == users[b] for b in range(blocks.num_blocks))
        assert not users.keys() & blocks._free.keys(), "a block is held and free"
        assert len(users) + blocks.num_free_blocks == blocks.num_blocks - 1, "a block leaked"
        assert len(blocks._block_of) == blocks.num_cached_blocks

    def encode(self, step: Step) -> None:
        """Do as the model runner does, with a picture's key in place of its embeddings."""
        self.num_encoded += len(step.images)
        for key in step.images:
            assert self.scheduler.image_cache.get(key) is None, "encoded a second time"
        for key, image in step.images.items():
            self.scheduler.image_cache.put(key, key, image.num_tokens)
        for chunk in step.chunks:
            sequence = chunk.sequence
            for index in sequence.images_between(chunk.start, chunk.end):
                key = sequence.image_key(index)
                assert sequence.image_embeds.get(index, key) == key
                assert index in sequence.image_embeds or key in step.images, "not encoded"
                sequence.image_embeds[index] = key

    def run(self, chunk: Chunk) -> None:
        """Check all that the chunk reads, then write its own slots."""
        sequence, size = chunk.sequence, self.scheduler.blocks.block_size
        prefixes = identities(sequence, [*sequence.token_ids, *chunk.draft][: chunk.end])
        slots = [sequence.block_table[i // size] * size + i % size for i in range(chunk.end)]
        for slot, prefix in zip(slots[: chunk.start], prefixes, strict=False):
            assert self.pool[slot] == prefix, "reads what another prefix wrote"
        for index in range(chunk.start, chunk.end):
            block = sequence.block_table[index // size]
            assert self.scheduler.blocks._num_users[block] == 1, "writes into a shared block"
            self.pool[slots[index]] = prefixes[index]


def identities(sequence: Sequence, token_ids: list[int]) -> list[int]:
    """The whole beginning up to each token, as one number: what keys and values depend on."""
    pictures = iter(
        (k, place)
        for k, image in enumerate(sequence.request.prompt.images)
        for place in range(image.num_tokens)
    )
    found, prefix = [], hash(sequence.request.cache_salt)
    for index, token in enumerate(token_ids):
        seen = None
        if token == PLACEHOLDER and index < sequence.num_prompt_tokens:
            k, place = next(pictures)
            seen = (sequence.request.prompt.images[k].patches.tobytes(), place)
        prefix = hash((prefix, token, seen))
        found.append(prefix)
    return found


def play(rng: Random) -> Simulation:
    """Play one random history to its end: arrivals, pictures, shared beginnings, aborts."""
    block_size = rng.randint(1, 4)
    num_blocks = 2 + rng.randint(4, 20) // block_size
    max_num_seqs = rng.randint(1, 4)
    simulation = Simulation(
        make_scheduler(
            num_blocks,
            block_size,
            max_num_seqs,
            rng.randint(max_num_seqs, 12),
            rng.choice([0, 2, 5, 100]),
            rng.randint(1, 12),
        )
    )
    scheduler = simulation.scheduler
    to_come = rng.randint(1, 4)
    added: list[Sequence] = []
    aborted: list[Sequence] = []
    for _ in range(600):
        if to_come and rng.random() < 0.6:
            to_come -= 1
            capacity = scheduler.blocks.capacity_tokens
            sequence = random_sequence(rng, capacity, guesses=rng.random() < 0.5)
            scheduler.add(sequence)
            added.append(sequence)
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and rng.random() < 0.05:
            victim = rng.choice(alive)
            scheduler.remove(victim, is_poisoned=rng.random() < 0.5)
            aborted.append(victim)
            assert not victim.block_table
            assert not victim.image_embeds
        busy = bool(scheduler.running or scheduler.waiting)
        assert bool(simulation.step().chunks) == busy, "a step without work while requests wait"
        if not to_come and not scheduler.running and not scheduler.waiting:
            break
    simulation.check_blocks()
    assert scheduler.blocks.num_free_blocks == num_blocks - 1, "somebody has not ended"
    for sequence in added:
        whole = sequence.num_completion_tokens == sequence.max_tokens
        assert whole != any(sequence is one for one in aborted)
    return simulation


def random_sequence(rng: Random, capacity: int, guesses: bool) -> Sequence:
    """A request that fits, often with the beginning of another one."""
    pictures = [rng.choice(PICTURES) for _ in range(rng.choice([0, 0, 1, 2]))]
    ids: list[int] = [1] * rng.randint(0, 5)
    kept = []
    for picture in pictures:
        if len(ids) + picture.num_tokens + 1 < capacity:
            ids += [PLACEHOLDER] * picture.num_tokens
            kept.append(picture)
        ids += [1] * rng.randint(0, 2)
    ids = [*ids, *rng.choices([2, 3], k=rng.randint(0, 6))]
    if len(ids) > capacity - 1 and not kept:
        ids = ids[: capacity - 1]
    while len(ids) > capacity - 1:
        ids.remove(next(i for i in ids if i != PLACEHOLDER))
    ids = ids or [1]
    max_tokens = rng.randint(1, min(10, capacity - len(ids)))
    salt, priority = rng.choice([None, None, "a"]), rng.choice([0, 0, 0, -1, 1])
    proposer = Guesser(rng) if guesses else None
    return make_sequence("r", ids, max_tokens, tuple(kept), salt, priority, proposer)
