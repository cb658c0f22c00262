"""Where the suite runs: a GPU, or a CPU that interprets the kernels (passed to every step).

Holds the device and the clock. A clock that does not measure says so; it never makes a number up.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]

L2_TURNS = 3
"""Buffers that are read in turn hold this many times the L2 cache, so that none is found in it."""

MOST_COPIES = 512
"""Enough for the smallest matrix of a 2B model at 2 bits (590 kB) in 100 MB of L2 cache."""
LEAST_NODES = 20
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds over several rounds."""

    us: float
    least_us: float
    most_us: float
    how: str = "graph"
    """"graph", or "eager" for calls that cannot be captured: launches count too."""


class Clock(Protocol):
    """What times calls."""

    def copies(self, nbytes: int) -> int:
        """Say how many sets of buffers of `nbytes` each must take turns."""

    def time(self, calls: Sequence[Call]) -> Timing | None:
        """Time one call of several that do the same on different buffers; None: not timed."""


class GraphClock:
    """Times calls as a server makes them: captured in one CUDA graph, buffers in turns."""

    def __init__(self, cache_bytes: int) -> None:
        self.cache_bytes = cache_bytes

    def copies(self, nbytes: int) -> int:
        """Return as many as fill `L2_TURNS` caches, at least two."""
        return min(MOST_COPIES, max(2, -(-L2_TURNS * self.cache_bytes // max(nbytes, 1))))

    def time(self, calls: Sequence[Call]) -> Timing:
        """Capture every call at least once and replay; median, least and most of the replays.

        What cannot be captured, as it copies from the host, is called from Python instead.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()  # compiles what must not be compiled during capture
            calls[-1]()
        torch.cuda.current_stream().wait_stream(side)
        turns = -(-LEAST_NODES // len(calls))

        def run_all() -> None:
            for call in itertools.chain.from_iterable(itertools.repeat(calls, turns)):
                call()

        graph, how = torch.cuda.CUDAGraph(), "graph"
        try:
            with torch.cuda.graph(graph):
                run_all()
        except RuntimeError:
            torch.cuda.synchronize()  # raises again if it was more than the capture
            how = "eager"
        run = graph.replay if how == "graph" else run_all
        run()
        torch.cuda.synchronize()
        taken = []
        for _ in range(REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop) * 1e3 / (turns * len(calls)))
        return Timing(statistics.median(taken), min(taken), max(taken), how)


class NoClock:
    """Runs a call and measures nothing: an interpreter's time says nothing about a GPU."""

    def copies(self, nbytes: int) -> int:
        """One set is enough."""
        return 1

    def time(self, calls: Sequence[Call]) -> None:
        """Run the first call."""
        calls[0]()


@dataclasses.dataclass(frozen=True)
class Place:
    """A device and its clock."""

    device: torch.device
    clock: Clock

    @property
    def is_gpu(self) -> bool:
        """Whether kernels are compiled, front doors choose them and real shapes are affordable."""
        return self.device.type == "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of activations; the interpreter multiplies raw bits of bfloat16."""
        return (torch.float16, torch.bfloat16) if self.is_gpu else (torch.float16,)

    def is_healthy(self) -> bool:
        """Say whether this process can still use the device: an illegal access ends that."""
        if not self.is_gpu:
            return True
        try:
            torch.cuda.synchronize(self.device)
            torch.ones(1, device=self.device).item()
        except RuntimeError:
            return False
        return True


def find_place(interpret: bool) -> Place:
    """Take the current GPU, or the CPU.

    Args:
        interpret: take the CPU; `TRITON_INTERPRET=1` must have been set before triton's import.

    Raises:
        RuntimeError: if a GPU is asked for and there is none.
    """
    if interpret:
        return Place(torch.device("cpu"), NoClock())
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible; --interpret runs without one")
    device = torch.device("cuda", torch.cuda.current_device())
    return Place(device, GraphClock(torch.cuda.get_device_properties(device).L2_cache_size))
