"""Find the launch options and row limits of this GPU and write them where the runtime looks.

    python -m benchmarks.tune [--out DIR]
    python -m benchmarks.tune --interpret --out DIR    # no GPU: the whole flow, a pretended clock

For each kernel a few options are timed on matrices of real models, in CUDA graphs with buffers that
outrun the cache. One is kept that gives the same bits as the default, makes no model's layer slower
and is more than 3 % faster over the models, seen twice. Then the row counts where GEMV, GEMM and
decoding cross. Warps and stages only: tuning never changes how a matrix is split.
`mgvq_kernels.tuned` says how the file is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.dense_cases import CASES as DENSE_CASES
from benchmarks.gpu_suite.place import Place, Timing, find_place
from benchmarks.gpu_suite.shapes import MODELS, TINY, Linear
from benchmarks.gpu_suite.vq_cases import LINEARS
from benchmarks.gpu_suite.weights import packed_copies
from mgvq_kernels import tuned
from mgvq_kernels.dispatch import RowLimits
from mgvq_kernels.layout import VQLayout
from mgvq_kernels.triton import vq_dequant, vq_gemm, vq_gemv
from mgvq_kernels.tuned import Tuned

Options = Mapping[str, int]
Shapes = Mapping[str, Sequence[Sequence[Callable[[], Tensor]]]]
"""By model, for each of its shapes the calls that do the same on different buffers."""

Times = Mapping[str, Sequence[float]]
"""By model, microseconds of each of its shapes."""

LEAST_GAIN = 1.03
"""A win below this is noise."""

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Row counts at which the kernels are compared."""

LINEAR_SHAPES = (*MODELS["Qwen2-VL-7B"], *MODELS["Qwen2-VL-2B"])
"""What options are timed on: both sizes, so that none is chosen for one shape."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A kernel, what to try beside its default, and what to try it on."""

    kernel: str
    """As its launcher names it to `tuned.launch_options`."""
    candidates: tuple[Options, ...]
    make: Callable[[Place], Shapes]


class PretendedClock:
    """Pretends that each time is 5 % less than the one before: for the flow without a GPU only."""

    def __init__(self) -> None:
        self.us = 100.0

    def copies(self, nbytes: int) -> int:
        """One set is enough."""
        return 1

    def time(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Return a time that nobody measured; nothing is run, bits are compared elsewhere."""
        self.us *= 0.95
        return Timing(self.us, self.us, self.us)


def grid(warps: Sequence[int], stages: Sequence[int], default: Options) -> tuple[Options, ...]:
    """List combinations, the default left out."""
    every = ({"num_warps": w, "num_stages": s} for w in warps for s in stages)
    return tuple(options for options in every if options != default)


def products(kernel: str, bits: int, rows: int, place: Place) -> Shapes:
    """Multiply `rows` rows by matrices of `bits` bits, by one kernel."""
    shapes: dict[str, list[Any]] = {}
    for linear in LINEAR_SHAPES if place.is_gpu else TINY:
        x = _random_rows(place, rows, linear)
        multiply = LINEARS[kernel][0]
        calls = [functools.partial(multiply, x, w, None, None) for w in copies(place, linear, bits)]
        shapes.setdefault(linear.model, []).append(calls)
    return shapes


def copies(place: Place, linear: Linear, bits: int) -> list[Any]:
    """Pack a matrix of `bits` bits as often as outruns the cache."""
    layout = VQLayout.uniform(linear.out_features, linear.in_features, bits)
    return packed_copies(layout, place.clock.copies(layout.code_bits() // 8), place.device)


def decodings(place: Place) -> Shapes:
    """Decode matrices of 2 bits."""
    decode = functools.partial(vq_dequant.vq_dequantize, dtype=torch.float16)
    shapes: dict[str, list[Any]] = {}
    for linear in LINEAR_SHAPES if place.is_gpu else TINY:
        calls = [functools.partial(decode, weight) for weight in copies(place, linear, 2)]
        shapes.setdefault(linear.model, []).append(calls)
    return shapes


def attention(place: Place) -> Shapes:
    """Attend to long contexts, as the suite's first real case does."""
    make = DENSE_CASES["paged_attention_decode"]
    first = next(make(place, place.is_gpu))
    others = range(place.clock.copies(max(first.nbytes, 1)) - 1)
    return {"attention": [[first.run, *(next(make(place, place.is_gpu)).run for _ in others)]]}


def workloads() -> Iterator[Workload]:
    """List every kernel that is tuned, with at most six options each, the default one of them."""
    stages = vq_gemm.NUM_STAGES
    for dims, bits in ((4, 2), (8, 1)):
        warps = tuple({"num_warps": n} for n in (4, 8, 16) if n != vq_gemv.NUM_WARPS)
        make = functools.partial(products, "gemv", bits, 1)
        yield Workload(f"vq_gemv-d{dims}", warps, make)  # its loop is not pipelined: no stages
        for tokens in vq_gemm.TILE_TOKENS:
            default = {"num_warps": vq_gemm.num_warps(dims, tokens), "num_stages": stages}
            make = functools.partial(products, "gemm", bits, tokens)
            yield Workload(f"vq_gemm-d{dims}-{tokens}", grid((4, 8), (2, 3, 4), default), make)
    yield Workload("vq_dequant", ({"num_warps": 2}, {"num_warps": 8}), decodings)
    split = grid((2, 4, 8), (2, 3), {"num_warps": 4, "num_stages": 3})
    yield Workload("attend_split", split, attention)


def tune_kernel(place: Place, workload: Workload) -> tuple[Options, dict[str, Any]]:
    """Try a kernel's options.

    Returns:
        The options to launch it with beside its defaults (none: the defaults won), and what was
        measured or why an option was turned down, by option.
    """
    shapes = workload.make(place)
    force(place, workload.kernel, {})
    firsts = [calls[0] for model in shapes.values() for calls in model]
    truths = [call().clone() for call in firsts]
    default = times(place, shapes)
    measured: dict[str, Any] = {"default": default}
    gains: list[tuple[float, Options]] = []
    for options in workload.candidates if place.is_gpu else workload.candidates[:1]:
        force(place, workload.kernel, options)
        try:
            if any(not torch.equal(call(), y) for call, y in zip(firsts, truths, strict=True)):
                measured[str(options)] = "turned down: changes bits"
                continue
            taken = times(place, shapes)
        except Exception as error:  # noqa: BLE001  too much shared memory, too many registers, ..
            measured[str(options)] = f"turned down: {type(error).__name__}: {error}"[:300]
            continue
        measured[str(options)] = taken
        gains.append((gain(default, taken), options))
    best: Options = {}
    if gains and max(gains, key=lambda pair: pair[0])[0] > LEAST_GAIN:
        candidate = max(gains, key=lambda pair: pair[0])[1]
        again = {}
        for options in ({}, candidate):
            force(place, workload.kernel, options)
            again[str(options)] = times(place, shapes)
        measured["again"] = again
        if gain(again["{}"], again[str(candidate)]) > LEAST_GAIN:
            best = candidate
    force(place, workload.kernel, {})
    return best, measured


def force(place: Place, kernel: str, options: Options) -> None:
    """Launch one kernel with options from now on, all others with their defaults."""
    tuned.install(place.device, Tuned(launches={kernel: options}))


def times(place: Place, shapes: Shapes) -> Times:
    """Time every shape."""
    taken: dict[str, list[float]] = {}
    for model, of_model in shapes.items():
        timings = [place.clock.time(calls) for calls in of_model]
        taken[model] = [round(timing.us, 3) for timing in timings if timing is not None]
    return taken


def gain(default: Times, other: Times) -> float:
    """Return how many times faster than the default: 0 if a model's shapes together got slower.

    Shapes of one model are added up, as its layer is as slow as all of them; models are averaged
    geometrically. Had each shape the same weight, an option that speeds small ones up and slows
    the largest down would win: 8 warps for 64 rows did, on an H100.
    """
    ratios = [sum(default[model]) / sum(other[model]) for model in default]
    return 0.0 if min(ratios) < 1 else math.prod(ratios) ** (1 / len(ratios))


def find_limits(place: Place) -> tuple[RowLimits, dict[str, Any]]:
    """Find up to how many rows each kernel is the fastest, over the matrices of one model.

    Returns:
        The limits, and microseconds for all matrices by kernel and row count.
    """
    linears = MODELS["Qwen2-VL-7B"] if place.is_gpu else TINY
    weights = [copies(place, linear, 2) for linear in linears]
    measured: dict[str, dict[int, float]] = {name: {} for name in ("gemv", "gemm", "decode")}
    for rows in ROWS if place.is_gpu else ROWS[:2]:
        inputs = [_random_rows(place, rows, linear) for linear in linears]
        for name, taken in measured.items():
            multiply = LINEARS[name][0]
            pairs = zip(inputs, weights, strict=True)
            layer = [[functools.partial(multiply, x, w, None, None) for w in ws] for x, ws in pairs]
            taken[rows] = round(sum(times(place, {"layer": layer})["layer"]), 2)
    return cross(measured), measured


def cross(measured: Mapping[str, Mapping[int, float]]) -> RowLimits:
    """Choose limits so that no tried row count below one is faster elsewhere.

    Args:
        measured: microseconds by row count, of "gemv", "gemm" and "decode".
    """
    gemv, gemm, decode = (measured[name] for name in ("gemv", "gemm", "decode"))
    first = last_won(gemv, {n: min(gemm[n], decode[n]) for n in gemv})
    second = last_won({n: min(gemv[n] if n <= first else gemm[n], gemm[n]) for n in gemm}, decode)
    return RowLimits(first, max(first, second))


def last_won(ours: Mapping[int, float], theirs: Mapping[int, float]) -> int:
    """Return the most rows up to which ours never takes longer; 0 if it loses at once."""
    won = 0
    for rows in sorted(ours):
        if ours[rows] > theirs[rows]:
            break
        won = rows
    return won


def tune(place: Place) -> tuple[Tuned, dict[str, Any]]:
    """Tune every kernel, then the row limits with what was found in force."""
    launches: dict[str, Options] = {}
    measured: dict[str, Any] = {}
    for workload in workloads():
        best, measured[workload.kernel] = tune_kernel(place, workload)
        if best:
            launches[workload.kernel] = best
        print(f"{workload.kernel}: {dict(best) or 'the defaults'}", flush=True)
    tuned.install(place.device, Tuned(launches=launches))
    limits, measured["rows"] = find_limits(place)
    print(f"rows: GEMV up to {limits.gemv}, GEMM up to {limits.gemm}", flush=True)
    return Tuned(limits, launches), measured


def main(argv: Sequence[str] | None = None) -> int:
    """Tune this GPU; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the file (default: the runtime's)")
    parser.add_argument("--interpret", action="store_true", help="run without a GPU, time nothing")
    options = parser.parse_args(argv)
    if options.interpret and options.out is None:
        parser.error("--interpret pretends its times: give --out, a folder the runtime never reads")
    if options.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        environment = os.environ | {"TRITON_INTERPRET": "1"}  # triton was imported without it
        command = [
            sys.executable,
            "-m",
            "benchmarks.tune",
            "--interpret",
            "--out",
            str(options.out),
        ]
        os.execve(sys.executable, command, environment)
    try:
        place = find_place(options.interpret)
    except RuntimeError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if options.interpret:
        place = Place(place.device, PretendedClock())
        key = tuned.Key("pretended", "0.0", 1, "interpreter", tuned.source_hash())
    else:
        key = tuned.key_of(place.device)
    torch.manual_seed(0)
    table, measured = tune(place)
    path = (options.out or tuned.FOLDER) / tuned.file_name(key.gpu)
    tuned.write(path, key, table, measured)
    print(path)
    return 0


def _random_rows(place: Place, rows: int, linear: Linear) -> Tensor:
    return torch.randn(rows, linear.in_features, device=place.device).half()


if __name__ == "__main__":
    sys.exit(main())
