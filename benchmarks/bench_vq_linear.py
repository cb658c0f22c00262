"""vq_linear at 2 and 4 bits, lookups and trellis, against dense F.linear, on the CPU, in turns.

    python -m benchmarks.bench_vq_linear [--rows 1] [--threads 1] [--json FILE]

Each contender multiplies by one copy of its matrix after the other, as a model does: what lies in a
cache is what would lie there beside `ROTATED_BYTES` of other weights, or in the demonstration model
for its matrices. The dense weights are random; times do not depend on values. `ratio` is the
bfloat16 time over the lookups' time (medians), `memory` their packed bytes over the bfloat16 bytes;
`trellis_ratio` and `trellis_memory` likewise.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import environment, report, taking_turns, time_in_turns
from mgvq_kernels import ops
from mgvq_kernels.layout import CODECS, VQLayout, VQWeight
from mgvq_kernels.packing import pack

SHAPES = (
    (256, 256, 2),
    (512, 256, 2),
    (1536, 256, 2),
    (256, 768, 2),
    (2048, 256, 4),
    (1536, 1536, 2),
    (8960, 1536, 2),
    (1536, 8960, 2),
)
"""(out_features, in_features, bits): the demonstration model's matrices, then a 1.5B decoder's."""


ROTATED_BYTES = 200_000_000
"""How much the copies of a matrix take together: six times the last cache of the processor the
published numbers are of."""

MOST_COPIES = 64
"""Copies of a small matrix: about as much memory as the demonstration model has in all."""


def make_weight(out_features: int, in_features: int, bits: int, codec: str) -> VQWeight:
    """Make a matrix with random codes."""
    layout = VQLayout.uniform(out_features, in_features, bits, codec=codec)
    stages = layout.bands[0].stages
    return VQWeight(
        layout,
        codes=(
            tuple(
                torch.randint(0, 256, layout.code_shape(0, s), dtype=torch.uint8)
                for s in range(len(stages))
            ),
        ),
        codebooks=(
            tuple(
                torch.randint(-127, 128, (s.codebook_size, s.vector_dim), dtype=torch.int8)
                for s in stages
            ),
        ),
        codebook_scales=(tuple(torch.tensor(0.01) for _ in stages),),
        scales=torch.ones(out_features, dtype=torch.float16),
    )


def measure(out_features: int, in_features: int, bits: int, rows: int) -> dict[str, Any]:
    """Time one shape."""
    packed, trellis = (
        pack(make_weight(out_features, in_features, bits, codec), "cpu") for codec in CODECS
    )
    dense = torch.randn(out_features, in_features)
    dense16 = dense.bfloat16()
    x = torch.randn(rows, in_features)
    x16 = x.bfloat16()
    with torch.inference_mode():
        times = time_in_turns(
            {
                "vq": each_copy(packed, lambda weight: ops.vq_linear(x, weight)),
                "trellis": each_copy(trellis, lambda weight: ops.vq_linear(x, weight)),
                "bfloat16": each_copy(dense16, lambda weight: F.linear(x16, weight)),
                "float32": each_copy(dense, lambda weight: F.linear(x, weight)),
            }
        )
    return {
        "shape": [out_features, in_features],
        "bits": bits,
        "rows": rows,
        "times": times,
        "ratio": round(times["bfloat16"]["median_us"] / times["vq"]["median_us"], 2),
        "memory": round(packed.nbytes / dense16.nbytes, 3),
        "trellis_ratio": round(times["bfloat16"]["median_us"] / times["trellis"]["median_us"], 2),
        "trellis_memory": round(trellis.nbytes / dense16.nbytes, 3),
        "vq_code_gb_s": round(packed.num_codes / times["vq"]["median_us"] / 1e3, 2),
    }


def each_copy(weight: Any, run: Callable[[Any], Tensor]) -> Callable[[], object]:
    """Make a call that multiplies by the next of several copies of a matrix."""
    count = max(2, min(MOST_COPIES, -(-ROTATED_BYTES // weight.nbytes)))
    copies = [weight, *(copy.deepcopy(weight) for _ in range(count - 1))]
    return taking_turns([functools.partial(run, one) for one in copies])


def main() -> None:
    """Run every shape, print a table and the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1, help="rows of x (batch)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", help="also write the document to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ops.warm_up("cpu")
    machine = environment()
    print(
        f"{'shape':>12} bits   vq us (min)      trellis us (min) bf16 us (min)    fp32 us (min)    "
        "ratio  memory"
    )
    results = []
    for out_features, in_features, bits in SHAPES:
        result = measure(out_features, in_features, bits, arguments.rows)
        results.append(result)
        columns = [
            f"{t['median_us']:8.1f} ({t['min_us']:.1f})".ljust(16) for t in result["times"].values()
        ]
        name = f"{out_features}x{in_features}"
        tail = f"{result['ratio']:5.2f}  {result['memory']:.3f}"
        print(f"{name:>12} {bits:>4} {' '.join(columns)} {tail}")
    report({"benchmark": "vq_linear", "environment": machine, "results": results}, arguments.json)


if __name__ == "__main__":
    main()
