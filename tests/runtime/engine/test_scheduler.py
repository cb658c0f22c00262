"""Properties of the scheduler and the block manager, without a model and without torch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_runtime.cache.block_manager import DUMMY_BLOCK, BlockManager
from mgvq_runtime.engine.output import OutputText
from mgvq_runtime.engine.scheduler import Chunk, Scheduler
from mgvq_runtime.engine.sequence import Sequence
from mgvq_runtime.request import Prompt, Request, SamplingParams


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_sequence(name: str, num_prompt: int, max_tokens: int) -> Sequence:
    request = Request(name, Prompt.from_token_ids([1] * num_prompt), SamplingParams())
    output = OutputText(NoText(), request.sampling_params, (), max_tokens)
    return Sequence(request, max_tokens, seed=0, placeholder_ids=(), output=output)


@dataclass
class Simulation:
    """Plays the engine: runs chunks, appends tokens, ends what has all of its tokens."""

    scheduler: Scheduler

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        self.check(chunks)
        for chunk in chunks:
            chunk.sequence.advance(chunk.end - chunk.start)
            if chunk.is_sampled:
                chunk.sequence.token_ids.append(2)
                if chunk.sequence.num_completion_tokens == chunk.sequence.max_tokens:
                    self.scheduler.remove(chunk.sequence)
        return chunks

    def check(self, chunks: list[Chunk]) -> None:
        """Assert what must hold between any two steps."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        assert sum(chunk.end - chunk.start for chunk in chunks) <= scheduler.max_batch_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        held = [block for seq in scheduler.running for block in seq.block_table]
        assert DUMMY_BLOCK not in held
        assert len(held) == len(set(held)), "a block belongs to two sequences"
        assert len(held) + blocks.num_free_blocks == blocks.num_blocks - 1, "a block leaked"
        assert not any(seq.block_table or seq.num_computed for seq in scheduler.waiting)
        for chunk in chunks:
            assert chunk.sequence in scheduler.running
            assert chunk.start == chunk.sequence.num_computed < chunk.end
            assert chunk.end <= len(chunk.sequence.block_table) * blocks.block_size
            assert chunk.is_sampled == (chunk.end == len(chunk.sequence.token_ids))


def make_scheduler(
    num_blocks: int, block_size: int, max_num_seqs: int, max_batch_tokens: int
) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, max_batch_tokens)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Scheduler, list[tuple[int, int, int]]]:
    """A scheduler and requests as (step of arrival, prompt tokens, new tokens), all that fit."""
    block_size = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(2, 14))
    max_num_seqs = draw(st.integers(1, 5))
    budget = draw(st.integers(max_num_seqs, 20))
    capacity = (num_blocks - 1) * block_size
    jobs = []
    for _ in range(draw(st.integers(1, 9))):
        if capacity < 2:
            break
        num_prompt = draw(st.integers(1, capacity - 1))
        jobs.append(
            (draw(st.integers(0, 12)), num_prompt, draw(st.integers(1, capacity - num_prompt)))
        )
    return make_scheduler(num_blocks, block_size, max_num_seqs, budget), sorted(jobs)


@settings(max_examples=250, deadline=None)
@given(workloads())
def test_every_request_ends_and_nothing_leaks(
    workload: tuple[Scheduler, list[tuple[int, int, int]]],
) -> None:
    scheduler, jobs = workload
    simulation = Simulation(scheduler)
    sequences = []
    for step in range(5000):
        for index, (arrival, num_prompt, max_tokens) in enumerate(jobs):
            if arrival == step:
                sequences.append(make_sequence(f"r{index}", num_prompt, max_tokens))
                scheduler.add(sequences[-1])
        busy = bool(scheduler.running or scheduler.waiting)
        chunks = simulation.step()
        assert bool(chunks) == busy, "a step without work while requests wait"
        if len(sequences) == len(jobs) and not scheduler.running and not scheduler.waiting:
            break
    assert [seq.num_completion_tokens for seq in sequences] == [seq.max_tokens for seq in sequences]
    assert len(sequences) == len(jobs)
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks - 1


@settings(max_examples=150, deadline=None)
@given(workloads(), st.data())
def test_aborts_in_every_state_leak_nothing(
    workload: tuple[Scheduler, list[tuple[int, int, int]]], data: st.DataObject
) -> None:
    scheduler, jobs = workload
    simulation = Simulation(scheduler)
    alive = [make_sequence(f"r{i}", job[1], job[2]) for i, job in enumerate(jobs)]
    for sequence in alive:
        scheduler.add(sequence)
    while scheduler.running or scheduler.waiting:
        simulation.step()
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(alive))
            scheduler.remove(victim)
            assert not victim.block_table
            simulation.check([])
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks - 1


def test_decodes_run_before_prompts_and_a_long_prompt_is_read_in_chunks() -> None:
    scheduler = make_scheduler(64, 4, 4, 10)
    simulation = Simulation(scheduler)
    short, long = make_sequence("short", 3, 20), make_sequence("long", 25, 5)
    scheduler.add(short)
    simulation.step()
    scheduler.add(long)
    lengths = []
    for _ in range(3):
        chunks = simulation.step()
        assert chunks[0].sequence is short
        lengths.append(chunks[1].end - chunks[1].start)
    assert lengths == [9, 9, 7]


def test_requests_are_admitted_in_order_of_arrival() -> None:
    """A small request behind one that must wait for blocks does not overtake it."""
    scheduler = make_scheduler(9, 4, 4, 64)
    simulation = Simulation(scheduler)
    first, big, small = (
        make_sequence("first", 16, 8),
        make_sequence("big", 24, 4),
        make_sequence("small", 2, 2),
    )
    for sequence in (first, big, small):
        scheduler.add(sequence)
    order = []
    while scheduler.running or scheduler.waiting:
        for chunk in simulation.step():
            if chunk.sequence not in order:
                order.append(chunk.sequence)
    assert order == [first, big, small]


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
            assert list(scheduler.waiting) == [new]
            assert new.num_completion_tokens > 0
            preempted["new"] += 1
    assert preempted["new"] >= 1
    assert (old.num_completion_tokens, new.num_completion_tokens) == (12, 9)


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


def test_scheduler_imports_no_torch() -> None:
    program = (
        "import sys, mgvq_runtime.engine.scheduler, mgvq_runtime.cache.block_manager\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
