"""Decode speed of two checkpoints side by side, one request at a time.

    python -m benchmarks.bench_decode --checkpoint 2BIT --reference DENSE --reference-dtype bfloat16

Both models are loaded into one process and take turns, so that whatever else the machine does hits
both alike; the ratio is the median of the ratios of neighbouring runs. Text only, no end token: the
time of a step depends on the context's length alone. The last line of the output is one JSON
document. Prompt speed and batches are not measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from mgvq_runtime import Engine, EngineConfig, Prompt, Request, SamplingParams
from mgvq_runtime.errors import MgvqError

TITLES = ("tokens/s", "20%", "80%", "ttft ms", "GB/s", "weights MiB", "read a token MiB")


@dataclass
class Contestant:
    """One checkpoint and what was measured on it."""

    name: str
    engine: Engine
    tokens_per_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    def run(self, prompt: Prompt, num_new_tokens: int) -> tuple[float, float]:
        """Answer once; returns decode tokens a second and seconds to the first token."""
        params = SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True)
        began = time.perf_counter()
        # A salt of its own: no run finds what an earlier one has cached.
        self.engine.add(Request("bench", prompt, params, cache_salt=str(began)))
        while not self.engine.step():
            pass
        first = time.perf_counter()
        while self.engine.has_unfinished():
            self.engine.step()
        last = time.perf_counter()
        return (num_new_tokens - 1) / (last - first), first - began

    def summary(self) -> dict[str, Any]:
        """Return medians, percentiles and sizes."""
        memory = self.engine.memory_summary()
        speed = statistics.median(self.tokens_per_s)
        fifths = statistics.quantiles(self.tokens_per_s, n=5)
        return {
            "checkpoint": self.name,
            "dtype": self.engine.config.dtype,
            "decode_tokens_per_s": round(speed, 2),
            "decode_tokens_per_s_p20": round(fifths[0], 2),
            "decode_tokens_per_s_p80": round(fifths[3], 2),
            "ttft_s": round(statistics.median(self.ttft_s), 5),
            "gigabytes_per_s": round(speed * memory.decode_bytes / 1e9, 2),
            "weights_bytes": memory.weights_bytes,
            "decode_bytes": memory.decode_bytes,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    try:
        result = compare(parsed)
    except MgvqError as error:
        print(f"bench_decode: error: {error}", file=sys.stderr)
        return 2
    print_table(result)
    text = json.dumps(result)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="what is measured")
    parser.add_argument(
        "--reference", required=True, metavar="DIR", help="what it is compared with"
    )
    parser.add_argument("--dtype", default="auto", help="activations of the first")
    parser.add_argument("--reference-dtype", default="auto", help="activations of the second")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each, at least 2")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    return parser


def compare(parsed: argparse.Namespace) -> dict[str, Any]:
    """Run both models in turns and return what was measured."""
    names = (parsed.checkpoint, parsed.reference)
    contestants = [
        Contestant(name, load(name, dtype, parsed))
        for name, dtype in zip(names, (parsed.dtype, parsed.reference_dtype), strict=True)
    ]
    vocab_size = min(c.engine.model_config.text_config.vocab_size for c in contestants)
    image_token_id = contestants[0].engine.model_config.image_token_id
    ids = [i for i in range(vocab_size) if i != image_token_id]
    prompt = Prompt.from_token_ids(Random(0).choices(ids, k=parsed.prompt_tokens))
    for contestant in contestants:
        contestant.run(prompt, 4)  # compiles kernels
    for repeat in range(parsed.repeats):
        for contestant in contestants[:: 1 if repeat % 2 else -1]:
            speed, ttft = contestant.run(prompt, parsed.new_tokens)
            contestant.tokens_per_s.append(speed)
            contestant.ttft_s.append(ttft)
    ours, reference = contestants
    pairs = zip(ours.tokens_per_s, reference.tokens_per_s, strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    return {
        "benchmark": "decode",
        "environment": environment(ours.engine.config.device),
        "prompt_tokens": parsed.prompt_tokens,
        "new_tokens": parsed.new_tokens,
        "repeats": parsed.repeats,
        "checkpoint": ours.summary(),
        "reference": reference.summary(),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
    }


def load(name: str, dtype: str, parsed: argparse.Namespace) -> Engine:
    """Load one checkpoint for one request at a time."""
    config = EngineConfig(
        checkpoint=name,
        device=parsed.device,
        dtype=dtype,
        max_model_len=parsed.prompt_tokens + parsed.new_tokens,
        max_num_seqs=1,
        num_threads=parsed.num_threads,
    )
    return Engine.from_checkpoint(config=config)


def environment(device: str) -> dict[str, Any]:
    """Say on what this was measured."""
    hardware = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    elif cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        hardware = models[0] if models else hardware
    return {
        "hardware": hardware,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(result: dict[str, Any]) -> None:
    """Print what a person wants to read first."""
    where = result["environment"]
    print(
        f"{where['hardware']}, {where['device']}, {where['threads']} thread(s), torch "
        f"{where['torch']}\nprompt {result['prompt_tokens']}, new {result['new_tokens']}, one "
        f"request at a time, median of {result['repeats']} alternating runs\n"
    )
    print(f"{'':12}" + "".join(f"{title:>18}" for title in TITLES))
    for row in ("checkpoint", "reference"):
        one = result[row]
        cells = (
            one["decode_tokens_per_s"],
            one["decode_tokens_per_s_p20"],
            one["decode_tokens_per_s_p80"],
            1000 * one["ttft_s"],
            one["gigabytes_per_s"],
            one["weights_bytes"] / 2**20,
            one["decode_bytes"] / 2**20,
        )
        print(f"{row:12}" + "".join(f"{cell:18.2f}" for cell in cells) + f"  {one['dtype']}")
    low, high = result["speedup_min"], result["speedup_max"]
    print(f"\nspeedup {result['speedup']} (median of paired ratios, {low} to {high})\n")


if __name__ == "__main__":
    sys.exit(main())
