"""Properties of the scheduler and the block manager, without a model and without torch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_runtime.cache.block_key import BlockKey, block_key, root_digest
from mgvq_runtime.cache.block_manager import BlockManager
from tests.runtime.engine.histories import (
    PICTURES,
    PLACEHOLDER,
    Simulation,
    make_scheduler,
    make_sequence,
    play,
)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_nothing_leaks_nothing_is_shared_by_mistake_and_every_request_ends(rng: Random) -> None:
    play(rng)


@pytest.mark.slow
def test_ten_thousand_histories() -> None:
    preempted = shared = accepted = rejected = 0
    for seed in range(10_000):
        simulation = play(Random(seed))
        preempted += simulation.scheduler.num_preemptions
        shared += simulation.num_shared_tokens
        accepted += simulation.num_accepted_tokens
        rejected += simulation.num_rejected_tokens
    assert preempted > 500
    assert shared > 10_000
    assert accepted > 5_000
    assert rejected > 2_000


def test_decodes_run_before_prompts_and_a_long_prompt_is_read_in_chunks() -> None:
    scheduler = make_scheduler(64, 4, 4, 10)
    simulation = Simulation(scheduler)
    short, long = make_sequence("short", 3, 20), make_sequence("long", 25, 5)
    scheduler.add(short)
    simulation.step()
    scheduler.add(long)
    lengths = []
    for _ in range(3):
        chunks = simulation.step().chunks
        assert chunks[0].sequence is short
        lengths.append(chunks[1].end - chunks[1].start)
    assert lengths == [9, 9, 7]


def test_requests_are_admitted_in_order_of_arrival() -> None:
    """A small request behind one that must wait for blocks does not overtake it."""
    scheduler = make_scheduler(9, 4, 4, 64)
    first, big, small = (
        make_sequence("first", 16, 8),
        make_sequence("big", 24, 4),
        make_sequence("small", 2, 2),
    )
    for sequence in (first, big, small):
        scheduler.add(sequence)
    assert first_runs(scheduler) == [first, big, small]


def first_runs(scheduler) -> list:
    """Run to the end; return the sequences in the order they first ran in."""
    simulation, order = Simulation(scheduler), []
    while scheduler.running or scheduler.waiting:
        for chunk in simulation.step().chunks:
            if chunk.sequence not in order:
                order.append(chunk.sequence)
    return order


def test_a_lower_priority_number_goes_first_and_is_preempted_last() -> None:
    scheduler = make_scheduler(64, 4, 1, 64)
    usual = [make_sequence("a", 3, 3), make_sequence("b", 3, 3)]
    urgent, idle = make_sequence("c", 3, 3, priority=-5), make_sequence("d", 3, 3, priority=2)
    for sequence in (idle, *usual, urgent):
        scheduler.add(sequence)
    assert first_runs(scheduler) == [urgent, *usual, idle]
    scheduler = make_scheduler(9, 2, 4, 64)
    simulation = Simulation(scheduler)
    early, urgent = make_sequence("early", 4, 12), make_sequence("urgent", 4, 9, priority=-1)
    scheduler.add(early)
    simulation.step()
    scheduler.add(urgent)
    while scheduler.running or scheduler.waiting:
        before = scheduler.num_preemptions
        simulation.step()
        if scheduler.num_preemptions > before:
            assert scheduler.waiting == [early]
    assert scheduler.num_preemptions


def test_the_newest_request_is_preempted_and_resumes_with_its_tokens() -> None:
    scheduler = make_scheduler(9, 2, 4, 64)
    simulation = Simulation(scheduler)
    old, new = make_sequence("old", 4, 12), make_sequence("new", 4, 9)
    scheduler.add(old)
    scheduler.add(new)
    preempted = Counter()
    while scheduler.running or scheduler.waiting:
        before = scheduler.num_preemptions
        simulation.step()
        if scheduler.num_preemptions > before:
            assert scheduler.waiting == [new]
            assert new.num_completion_tokens > 0
            preempted["new"] += 1
    assert preempted["new"] >= 1
    assert (old.num_completion_tokens, new.num_completion_tokens) == (12, 9)
    assert new.num_cached_tokens == 0, "what it finds when it resumes is its own"


def test_a_second_turn_runs_only_what_is_new() -> None:
    scheduler = make_scheduler(64, 4, 4, 64)
    simulation = Simulation(scheduler)
    picture = PICTURES[0]
    ids = [1, 1, PLACEHOLDER, PLACEHOLDER, *[3] * 7]
    first = make_sequence("first", ids, 6, (picture,))
    scheduler.add(first)
    while scheduler.running or scheduler.waiting:
        simulation.step()
    assert (first.num_cached_tokens, simulation.num_encoded) == (0, 1)
    second = make_sequence("second", [*first.token_ids, 4, 4, 4], 2, (picture,))
    scheduler.add(second)
    (chunk,) = simulation.step().chunks
    # 17 tokens are known of the first turn, the last of them was never run: 4 blocks are full
    assert (second.num_cached_tokens, chunk.start, chunk.end) == (16, 16, 20)
    assert simulation.num_encoded == 1, "a picture in the cache is not encoded"
    whole = make_sequence("whole", second.token_ids[:16], 2, (picture,))
    scheduler.add(whole)
    assert simulation.step().chunks[-1].start == 12, "the last token is always run"


def test_prompts_with_one_beginning_that_come_together_read_it_once() -> None:
    """The later ones wait until the first has filled the blocks they share, and no longer."""
    scheduler = make_scheduler(64, 4, 6, 6)
    simulation = Simulation(scheduler)
    beginning = [1, 2, 3] * 5
    for index in range(4):
        scheduler.add(make_sequence(f"r{index}", [*beginning, 4 + index, 2], 3))
    scheduler.add(make_sequence("other", 7, 3))
    lengths: list[list[int]] = []
    while scheduler.running or scheduler.waiting:
        prefills = [c for c in simulation.step().chunks if c.start < c.sequence.num_prompt_tokens]
        lengths.append([chunk.end - chunk.start for chunk in prefills])
    assert lengths[:3] == [[6], [6], [5, 1]]
    # three blocks of four tokens are shared; the fourth has a token that only one of them has
    assert sum(sum(step) for step in lengths) == 17 + 3 * (17 - 12) + 7
    assert simulation.num_shared_tokens == 3 * 12


def test_pictures_share_nothing_with_others_of_their_size_nor_across_salts() -> None:
    scheduler = make_scheduler(64, 2, 4, 64, image_cache_bytes=100)
    simulation = Simulation(scheduler)
    ids = [1, 1, PLACEHOLDER, PLACEHOLDER, 3, 3, 3]
    found = []
    for picture, salt in [(0, None), (1, None), (0, None), (0, "a"), (0, "a"), (0, "")]:
        sequence = make_sequence("r", ids, 1, (PICTURES[picture],), salt)
        scheduler.add(sequence)
        simulation.step()
        found.append((sequence.num_cached_tokens, simulation.num_encoded))
    assert found == [(0, 1), (2, 2), (6, 2), (0, 3), (6, 3), (0, 4)]


def test_a_step_encodes_one_picture_at_least_and_each_once() -> None:
    ids = [PLACEHOLDER, PLACEHOLDER, 3] * 3
    pictures = (PICTURES[0], PICTURES[0], PICTURES[1])  # four patches each
    for budget, expected in [(1, [1, 1, 1, 1]), (7, [1, 1, 1, 1]), (8, [2, 2]), (16, [4])]:
        scheduler = make_scheduler(64, 4, 4, 64, image_cache_bytes=100, max_batch_patches=budget)
        simulation = Simulation(scheduler)
        for salt in ("a", "b", "a"):
            scheduler.add(make_sequence("r", ids, 1, pictures, salt))
        counts = []
        while scheduler.running or scheduler.waiting:
            counts.append(len(simulation.step().images))
        assert [number for number in counts if number] == expected, (
            "two pictures for each of two tenants"
        )


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(4, 4, 2, 8)
    scheduler.add(make_sequence("fits", 8, 4))
    with pytest.raises(ValueError, match="cannot run in 12 tokens"):
        scheduler.add(make_sequence("long", 9, 4))
    with pytest.raises(ValueError, match="max_batch_tokens"):
        make_scheduler(4, 4, 8, 4)


def test_blocks_are_allocated_all_or_nothing_and_never_freed_twice() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    table: list[int] = []
    assert blocks.allocate(table, 9)
    assert sorted(table) == [1, 2, 3]
    assert blocks.allocate(table, 12)
    other: list[int] = []
    assert not blocks.allocate(other, 1)
    assert other == []
    copy = list(table)
    blocks.release(table)
    assert table == []
    assert blocks.num_free_blocks == 3
    with pytest.raises(ValueError, match="not in use"):
        blocks.release(copy)
    with pytest.raises(ValueError, match="at least two blocks"):
        BlockManager(1, 4)


def keys(count: int) -> list[BlockKey]:
    found = [block_key(root_digest((), None), [0], b"", ())]
    for token in range(1, count):
        found.append(block_key(found[-1].digest, [token], b"", ()))
    return found


def test_what_was_used_longest_ago_is_overwritten_first_and_ends_before_beginnings() -> None:
    blocks = BlockManager(num_blocks=6, block_size=1)
    chain = keys(3)
    old: list[int] = []
    blocks.allocate(old, 3)
    for block, key in zip(old, chain, strict=True):
        blocks.register(block, key)
    held = list(old)
    blocks.release(old)
    assert blocks.find(chain) == held
    assert blocks.num_free_blocks == 5
    taken: list[int] = []
    blocks.allocate(taken, 2)
    assert blocks.find(chain) == held, "blocks that hold nothing go first"
    blocks.allocate(taken, 3)
    assert blocks.find(chain) == held[:2], "the end goes before the beginning"
    shared: list[int] = []
    blocks.share(shared, blocks.find(chain))
    assert blocks.num_free_blocks == 0
    assert not blocks.has_room([], 1, 0)
    blocks.forget(shared)
    assert blocks.find(chain) == []
    blocks.release(shared)
    assert (blocks.num_free_blocks, blocks.num_cached_blocks) == (2, 0)


def test_a_hit_compares_tokens_too() -> None:
    blocks = BlockManager(num_blocks=3, block_size=2)
    table: list[int] = []
    blocks.allocate(table, 2)
    key = block_key(b"", [1, 2], b"", ())
    blocks.register(table[0], key)
    assert blocks.find([key]) == table
    assert blocks.find([BlockKey(key.digest, (1, 3))]) == []


def test_a_key_depends_on_everything_that_keys_and_values_depend_on() -> None:
    root = root_digest(("model", "float16"), None)
    picture = b"p" * 32
    variants = [
        block_key(root, [1, 2], b"\0", [(picture, 0)]),
        block_key(root_digest(("other", "float16"), None), [1, 2], b"\0", [(picture, 0)]),
        block_key(root_digest(("model", "int8"), None), [1, 2], b"\0", [(picture, 0)]),
        block_key(root_digest(("model", "float16"), ""), [1, 2], b"\0", [(picture, 0)]),
        block_key(root, [1, 3], b"\0", [(picture, 0)]),
        block_key(root, [1, 2], b"\1", [(picture, 0)]),
        block_key(root, [1, 2], b"\0", [(b"q" * 32, 0)]),
        block_key(root, [1, 2], b"\0", [(picture, 2)]),
        block_key(root, [1, 2], b"\0", []),
        block_key(root, [1, 2], b"\0", [(picture, 0), (picture, 2)]),
    ]
    assert len({key.digest for key in variants}) == len(variants)
    assert all(len(key.digest) == 32 for key in variants)
    assert block_key(root, [1, 2], b"\0", [(picture, 0)]) == variants[0]


def test_the_scheduler_imports_no_torch() -> None:
    program = (
        "import sys, mgvq_runtime.engine.scheduler, mgvq_runtime.cache.block_manager\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
