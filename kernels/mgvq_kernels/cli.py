"""`mgvq-bench kernels --static`: what the GPU kernels ask of a GPU that is not there (a command).

Compiles every kernel ahead of time and reads registers, shared memory, stack and spills out of the
machine code. Times nothing: that needs a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

EXIT_NO_TRITON = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 1 where a kernel spills or uses the stack; 2 where triton is not installed.
    """
    options = parse(argv)
    if importlib.util.find_spec("triton") is None:
        print(
            "mgvq-bench kernels: triton is not installed (it has wheels for Linux)", file=sys.stderr
        )
        return EXIT_NO_TRITON
    rows = []
    if not options.json:
        print(f"{'kernel':36}{'arch':>6}{'registers':>11}{'shared':>9}{'stack':>7}{'spills':>8}"
              f"{'instr/weight':>14}")  # fmt: skip
    for row in measure(options.arch, options.kernel, options.all):
        rows.append(row)
        if not options.json:
            each = row["instructions_per_weight"]
            print(
                f"{row['kernel']:36}{row['arch']:>6}{row['registers']:>11}{row['shared_bytes']:>9}"
                f"{row['stack']:>7}{row['spills']:>8}{'-' if each is None else each:>14}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"kernels": rows}))
    return int(any(row["stack"] or row["spills"] for row in rows))


def measure(capabilities: Sequence[int], prefix: str, every: bool) -> Iterator[dict[str, Any]]:
    """Compile kernels and describe each.

    Args:
        capabilities: ten times the compute capability of each GPU.
        prefix: how the names of the variants begin; "" for all.
        every: whether all variants are compiled, or the heaviest of each kernel.

    Yields:
        Name, arch, registers a thread, shared_bytes a program, stack bytes, spills, instructions
        of the main loop a weight (None for kernels that stream no weights).
    """
    from mgvq_kernels.triton import aot, variants

    for variant in variants.variants() if every else variants.main_variants():
        if not variant.name.startswith(prefix):
            continue
        for capability in capabilities:
            used = aot.compile_for(variant, capability)
            weights = variant.loop_weights
            yield {
                "kernel": variant.name,
                "arch": f"sm_{capability}",
                "registers": used.registers,
                "shared_bytes": used.shared_bytes,
                "stack": used.stack_bytes,
                "spills": used.spills,
                "instructions_per_weight": round(used.loop_instructions / weights, 2)
                if weights
                else None,
            }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="mgvq-bench", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    kernels = commands.add_parser(
        "kernels", help="what the GPU kernels use, by their machine code", allow_abbrev=False
    )
    kernels.add_argument(
        "--static", action="store_true", required=True, help="compile ahead of time; run nothing"
    )
    kernels.add_argument("--json", action="store_true", help="print one line of JSON")
    kernels.add_argument("--all", action="store_true", help="every variant, not one a kernel")
    kernels.add_argument("--kernel", default="", metavar="PREFIX", help="only names that begin so")
    kernels.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 86, 87, 89, 90],
        choices=[80, 86, 87, 89, 90],
        help="compute capabilities, times ten (default: all)",
    )
    return parser.parse_args(argv)
