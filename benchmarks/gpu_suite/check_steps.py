"""Steps that compare every op of `mgvq_kernels.ops.OPS` with float64 (called by the worker)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from benchmarks.gpu_suite import dense_cases, vq_cases
from benchmarks.gpu_suite.cases import Cases, measure_error
from benchmarks.gpu_suite.place import Place
from benchmarks.gpu_suite.steps import Row, Step
from mgvq_kernels import ops

CASES: Mapping[str, Cases] = {**vq_cases.CASES, **dense_cases.CASES}
"""How every op is checked and timed."""


def check_steps(place: Place, real: bool) -> list[Step]:
    """List a step an op for small shapes and, if asked for, one for a shape of a real model."""
    bind = functools.partial
    steps = [Step(f"check {op}", 0, 10, bind(check, op, place, False)) for op in ops.OPS]
    if real:
        name = "check {}, real shape"
        steps += [Step(name.format(op), 1, 10, bind(check, op, place, True)) for op in ops.OPS]
    return steps


def check(op: str, place: Place, real: bool) -> Iterator[Row]:
    """Run the cases of one op.

    Yields:
        Op, variant, metric, error, tolerance and whether it passed; the message where it raised.

    Raises:
        LookupError: if the op has no cases.
    """
    if op not in CASES:
        raise LookupError(
            f"ops.OPS names {op}, which has no cases: add a generator to CASES of vq_cases.py or "
            f"dense_cases.py in benchmarks/gpu_suite"
        )
    for case in CASES[op](place, real):
        row: Row = {"kind": "check", "op": op, "variant": case.variant, "metric": case.metric}
        row["tolerance"] = case.tolerance
        try:
            error = measure_error(case)
        except Exception as raised:  # noqa: BLE001  the next case may well run
            yield row | {"passed": False, "message": f"{type(raised).__name__}: {raised}"}
            if not place.is_healthy():
                return
            continue
        yield row | {"passed": error <= case.tolerance, "error": error}
