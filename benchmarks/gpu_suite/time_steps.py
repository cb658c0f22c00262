"""Steps that time our kernels: linears by every way and row count, then the other ops.

Called by the worker. Buffers take turns so that weights come from memory, never from the L2 cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from benchmarks.gpu_suite.check_steps import CASES
from benchmarks.gpu_suite.place import Place, Timing
from benchmarks.gpu_suite.shapes import MODELS, ROWS, TINY, Linear
from benchmarks.gpu_suite.steps import Row, Step
from benchmarks.gpu_suite.vq_cases import linears_of
from benchmarks.gpu_suite.weights import packed_copies
from mgvq_kernels import ops
from mgvq_kernels.layout import CODECS, VQLayout

DTYPE = torch.float16

MOST_SETS = 16
"""Sets of buffers of an op without weights: what they hold is a cache's in a server too."""

RATES = (1, 3, 4)
"""Bits a weight that one matrix is timed at beside the 2 of all others."""


def time_steps(place: Place) -> list[Step]:
    """List a step a matrix, a step for the other rates, a step for each other op."""
    bind = functools.partial
    if not place.is_gpu:
        steps = [
            Step(f"time tiny {codec}", 2, 5, bind(linear_times, place, TINY[0], 2, codec))
            for codec in CODECS
        ]
    else:
        steps = [
            Step(
                f"time {linear.model} {linear.name}",
                2 + i,
                15,
                bind(linear_times, place, linear, 2, "lookup"),
            )
            for i, linears in enumerate(MODELS.values())
            for linear in linears
        ]
        steps += [
            Step(
                f"time {linear.model} {linear.name} as a trellis",
                3,
                10,
                bind(linear_times, place, linear, 2, "trellis"),
            )
            for linear in MODELS["Qwen2-VL-7B"]
        ]
        o_proj = MODELS["Qwen2-VL-7B"][1]
        steps += [
            Step(
                f"time {o_proj.model} {o_proj.name}, {codec} at {bits} bits",
                5,
                15,
                bind(linear_times, place, o_proj, bits, codec),
            )
            for bits in RATES
            for codec in CODECS
        ]
        permuted = bind(linear_times, place, o_proj, 2, "lookup", has_permutation=True)
        steps.append(Step(f"time {o_proj.model} permuted {o_proj.name}", 4, 15, permuted))
    others = [op for op in ops.OPS if op != "vq_linear"]
    return steps + [Step(f"time {op}", 3, 6, bind(op_times, place, op)) for op in others]


def linear_times(
    place: Place, linear: Linear, bits: int, codec: str, has_permutation: bool = False
) -> Iterator[Row]:
    """Time one matrix by every way to multiply, at the row counts each takes."""
    layout = VQLayout.uniform(linear.out_features, linear.in_features, bits, has_permutation, codec)
    count = place.clock.copies(layout.code_bits() // 8)
    weights = packed_copies(layout, count, place.device)
    for rows in ROWS if place.is_gpu else ROWS[:1]:
        x = torch.randn(rows, linear.in_features, device=place.device).to(DTYPE)
        for name, (multiply, _, most) in linears_of(layout).items():
            if rows > most:
                continue
            calls = [functools.partial(multiply, x, weight, None, None) for weight in weights]
            timing = place.clock.time(calls)
            row = linear_row(name, linear, bits, rows, layout.code_bits() // 8, timing)
            yield row | ({"variant": f"{name}, permuted"} if has_permutation else {})


def linear_row(
    variant: str, linear: Linear, bits: float, rows: int, nbytes: int, timing: Timing | None
) -> Row:
    """Describe one timing of a matrix; `nbytes` are those of its codes."""
    return {
        "kind": "linear",
        "variant": variant,
        "model": linear.model,
        "linear": linear.name,
        "shape": [linear.out_features, linear.in_features],
        "bits": bits,
        "rows": rows,
        **timing_fields(timing, nbytes),
    }


def op_times(place: Place, op: str) -> Iterator[Row]:
    """Time the real-shape cases of one op, each on as many sets of buffers as outrun the cache."""
    first = list(CASES[op](place, place.is_gpu))
    least = min((case.nbytes for case in first if case.nbytes), default=0)
    count = min(place.clock.copies(least), MOST_SETS)
    sets = [first, *(list(CASES[op](place, place.is_gpu)) for _ in range(count - 1))]
    for alike in zip(*sets, strict=True):
        case = alike[0]
        if place.is_gpu and not case.nbytes:
            continue
        timing = place.clock.time([other.run for other in alike])
        row = {"kind": "op", "op": op, "variant": case.variant}
        yield row | timing_fields(timing, case.nbytes)


def timing_fields(timing: Timing | None, nbytes: int) -> Row:
    """Turn a timing into microseconds and GB/s of the bytes that had to move."""
    if timing is None:
        return {"us": None, "note": "not timed"}
    spread = (timing.most_us - timing.least_us) / timing.us
    return {
        "us": round(timing.us, 3 - min(2, int(math.log10(max(timing.us, 1))))),
        "spread": round(spread, 3),
        "how": timing.how,
        "gb_s": round(nbytes / timing.us / 1e3, 1),
    }
