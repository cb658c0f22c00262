"""A published model's shapes at 2 bits with random codes: how fast a GPU decodes, in what memory.

    python -m benchmarks.bench_synthetic --output benchmarks/results/synthetic_7b.json

Random codes cost what trained ones do, so no weights need to be at hand. In one process: tokens a
second of the quantized model, alone and in a batch, as a share of what the bytes it must read allow
at the measured copy bandwidth; the same graph with bfloat16 matrices; the memory taken against the
plan. `--gpu-memory-limit` makes a large GPU as tight as a small one. Not here: quality, kernels one
by one (`gpu_suite`). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_suite.weights import random_weight
from benchmarks.harness import environment, report
from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_runtime import Engine, EngineConfig, Prompt, Request, SamplingParams, demo_checkpoint_path
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec
from mgvq_runtime.checkpoint.writer import write_checkpoint
from mgvq_runtime.config import field_docs
from mgvq_runtime.engine.startup import start
from mgvq_runtime.errors import MgvqError
from mgvq_runtime.layers.linear import VQLinear
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.registry import find_family
from mgvq_runtime.models.sizes import DEFAULT_RATES

SHAPES = {
    "qwen2-vl-2b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2-vl-7b": (3584, 28, 28, 4, 18944, 152064, False),
}
"""hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size,
vocab_size, tie_word_embeddings."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
PROMPT_TOKENS = 256
PLAIN_TOKENS = 1024
"""Ids below this one stand for text in the bundled tokenizer, none for a picture."""
COPY_BYTES = 1 << 30


def hf_config(shape: str, demo: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """Return config.json of a shape, with the special tokens of the bundled tokenizer."""
    hidden, depth, heads, kv_heads, width, vocab, tied = SHAPES[shape]
    special = {key: value for key, value in demo.items() if key.endswith("token_id")}
    return {
        **special,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"hidden_size": hidden, "in_chans": 3},
    }


def write_synthetic(folder: Path, shape: str, bits: int, layers: int | None) -> None:
    """Write an MGVQ checkpoint of random codes.

    Args:
        folder: to be made.
        shape: a name of `SHAPES`.
        bits: bits a weight of the decoder's matrices.
        layers: decoder layers, None for all of them.
    """
    demo = Path(demo_checkpoint_path())
    config = hf_config(shape, json.loads((demo / "config.json").read_text()), layers)
    family = find_family(config)
    with torch.device("meta"):
        model = family.model(family.config.from_hf(config))
    layouts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 8 == 0:
            rate = DEFAULT_RATES.get(group_of(name), bits)
            layouts[name] = VQLayout.uniform(*module.weight.shape, rate, has_permutation=True)

    def dense() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") not in layouts:
                value = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
                yield name, torch.full(parameter.shape, value, dtype=torch.float16)

    def weights() -> Iterator[tuple[str, VQWeight]]:
        for seed, (name, layout) in enumerate(layouts.items()):
            weight = random_weight(layout, seed)
            # As large as trained rows are: activations must stay finite through all layers.
            scales = torch.full((layout.out_features,), 0.02 / layout.in_features**0.5)
            yield name, dataclasses.replace(weight, scales=scales.half())

    write_checkpoint(
        folder,
        config=config,
        quantization=QuantizationSpec(
            matrices={name: MatrixSpec(layout) for name, layout in layouts.items()},
            bits_per_weight={"target": float(bits)},
        ),
        dense=dense(),
        weights=weights(),
        copy_files=[demo / name for name in _TOKENIZER],
    )


class Decoding:
    """Requests of one engine, and how long their steps take once all of them answer."""

    def __init__(self, engine: Engine) -> None:
        """Take an engine."""
        self.engine = engine
        self._count = 0

    def step_seconds(self, num_requests: int, num_tokens: int) -> float:
        """Return the median of a step in which every request gets one token."""
        for _ in range(num_requests):
            self._count += 1
            ids = np.random.default_rng(self._count).integers(0, PLAIN_TOKENS, PROMPT_TOKENS)
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            prompt = Prompt.from_token_ids(ids.tolist())
            self.engine.add(Request(str(self._count), prompt, params))
        seconds = []
        while self.engine.has_unfinished():
            began = time.perf_counter()
            outputs = self.engine.step()
            if len(outputs) == num_requests:
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[num_tokens // 4 :])


def bytes_a_token(model: CausalLM) -> int:
    """Return the bytes of the decoder's matrices and of the head: what one token must read."""
    matrices = (m for name, m in model.named_modules() if not name.startswith("visual"))
    packed = [m.packed for m in matrices if isinstance(m, VQLinear)]
    if model.config.tie_word_embeddings:
        packed.append(model.model.embed_tokens.packed)
    return sum(weight.nbytes for weight in packed)


def make_dense(model: CausalLM) -> int:
    """Put bfloat16 matrices in the place of the decoder's quantized ones; returns their bytes."""
    total = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, VQLinear) or name.startswith("visual"):
            continue
        with torch.device(model.device):
            linear = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, dtype=model.dtype
            )
        linear.requires_grad_(False).weight.normal_(0, 0.02 / module.in_features**0.5)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, linear)
        total += linear.weight.nbytes
    return total


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a copy reads and writes, in its median run."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source))


def _median_seconds(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return statistics.median(taken[2:])


def measure(
    folder: Path, config: EngineConfig, batches: Sequence[int], tokens: int
) -> dict[str, Any]:
    """Load and decode, quantized and then dense; returns all figures."""
    device = torch.device("cuda")
    free_before = torch.cuda.mem_get_info(device)[0]
    bandwidth = copy_bandwidth(device)
    torch.cuda.empty_cache()
    model, processor, resolved, plan = start(folder, config)
    engine = Engine(model, processor, resolved)
    result: dict[str, Any] = {"copy_gb_per_s": round(bandwidth / 1e9, 1)}
    read = bytes_a_token(model)
    print("\n".join(plan.lines()), file=sys.stderr)
    quantized = {n: Decoding(engine).step_seconds(n, tokens) for n in batches}
    taken = free_before - torch.cuda.mem_get_info(device)[0]
    result["memory"] = {
        "planned_bytes": plan.planned_bytes,
        "taken_bytes": taken,
        "taken_to_planned": round(taken / plan.planned_bytes, 3),
    }
    result["read_bytes"] = read
    result["quantized"] = {
        n: {
            "tokens_per_s": round(n / seconds, 1),
            "step_ms": round(1000 * seconds, 3),
            "share_of_copy_bandwidth": round(read / seconds / bandwidth, 3),
        }
        for n, seconds in quantized.items()
    }
    if config.gpu_memory_limit is None:
        del engine
        dense_bytes = make_dense(model)
        torch.cuda.empty_cache()
        engine = Engine(model, processor, resolved)
        dense = {n: Decoding(engine).step_seconds(n, tokens) for n in batches}
        result["bfloat16"] = {
            n: {
                "tokens_per_s": round(n / seconds, 1),
                "step_ms": round(1000 * seconds, 3),
                "share_of_copy_bandwidth": round(dense_bytes / seconds / bandwidth, 3),
                "quantized_is_faster": round(seconds / quantized[n], 2),
            }
            for n, seconds in dense.items()
        }
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checkpoint, measure, print; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench_synthetic: error: this needs a CUDA GPU, none is here", file=sys.stderr)
        return 2
    machine = environment()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (parsed.folder or Path(scratch)) / f"{parsed.shape}-{parsed.bits}bit"
        try:
            if not folder.exists():
                began = time.perf_counter()
                write_synthetic(folder, parsed.shape, parsed.bits, parsed.layers)
                print(f"written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
            config = EngineConfig(
                device="cuda",
                dtype="bfloat16",
                max_num_seqs=max(parsed.batches),
                gpu_memory_limit=parsed.gpu_memory_limit,
                enforce_eager=parsed.enforce_eager,
            )
            result = measure(folder, config, parsed.batches, parsed.new_tokens)
        except MgvqError as error:
            print(f"bench_synthetic: error: {error}", file=sys.stderr)
            return 2
    document = {
        "benchmark": "synthetic",
        "environment": machine | {"gpu": torch.cuda.get_device_name()},
        "shape": parsed.shape,
        "bits": parsed.bits,
        "layers": parsed.layers,
        "gpu_memory_limit": parsed.gpu_memory_limit,
        "enforce_eager": parsed.enforce_eager,
        **result,
    }
    report(document, parsed.output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this benchmark."""
    docs = field_docs(EngineConfig)
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-vl-7b")
    parser.add_argument("--bits", type=int, choices=(1, 2, 3, 4), default=2)
    parser.add_argument("--layers", type=int, metavar="N", help="fewer decoder layers, for a try")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the checkpoint here")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--gpu-memory-limit", type=int, metavar="BYTES", help=docs["gpu_memory_limit"]
    )
    parser.add_argument("--enforce-eager", action="store_true", help=docs["enforce_eager"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
