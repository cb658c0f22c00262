"""vq_linear at 2 and 4 bits, lookups and trellis, against dense F.linear, on the CPU, in turns.

    python benchmarks/bench_vq_linear.py [--rows 1] [--threads 1] [--json FILE]

The dense weights are random; times do not depend on values. `ratio` is the bfloat16 time over the
lookups' time (medians), `memory` their packed bytes over the bfloat16 bytes; `trellis_ratio` and
`trellis_memory` likewise.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from harness import environment, report, time_in_turns

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
                "vq": lambda: ops.vq_linear(x, packed),
                "trellis": lambda: ops.vq_linear(x, trellis),
                "bfloat16": lambda: F.linear(x16, dense16),
                "float32": lambda: F.linear(x, dense),
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
