"""`mgvq-inspect DIR`: what is in a checkpoint, and what it needs to run (a command-line tool).

Reads headers and JSON only, unless `--verify` asks for every digest; loads no weight. Numbers are
counted from the files, never taken from what the checkpoint says of itself. Given a config.json
instead of a folder, it says what such a model would take at 2 bits. With `--plan` it divides the
memory of a device as the engine would, without loading anything.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgvq_kernels.layout import Stage
from mgvq_runtime.checkpoint.bits import TOTAL, count_bits
from mgvq_runtime.checkpoint.files import read_json
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.config import (
    EngineConfig,
    add_config_arguments,
    config_from_arguments,
    resolve_device,
)
from mgvq_runtime.env import debug_tracebacks
from mgvq_runtime.errors import ConfigError, MgvqError

if TYPE_CHECKING:
    from mgvq_runtime.engine.memory_plan import MemoryPlan

HALF_BYTES, FLOAT_BYTES = 2, 4
PLANNED_CONTEXT = 8192
"""Tokens of context that memory is planned for where only config.json is known."""
EXIT_BAD_FOLDER = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0, or 2 where the folder is not a checkpoint that can be used.
    """
    parser = argparse.ArgumentParser(
        prog="mgvq-inspect",
        description="Show what is in a checkpoint: bits, bands, sizes, memory it will need.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="an MGVQ or an unquantized folder, or a config.json alone",
    )
    parser.add_argument("--verify", action="store_true", help="read every tensor, check its digest")
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="show who gets which bytes with the engine flags below; needs a folder",
    )
    add_config_arguments(parser, leave_out=("checkpoint", "num_threads", "seed"))
    arguments = parser.parse_args(argv)
    shows_traceback = False
    try:
        shows_traceback = debug_tracebacks()
        if arguments.plan:
            if arguments.verify:  # first: a plan says nothing of it, unless by not coming
                open_checkpoint(arguments.checkpoint).verify()
            plan = plan_for(arguments.checkpoint, config_from_arguments(arguments))
            report, lines = plan.as_json(), plan.lines()
        elif arguments.checkpoint.suffix == ".json" and not arguments.verify:
            report = describe_config(arguments.checkpoint)
            lines = render_config(report)
        else:
            checkpoint = open_checkpoint(arguments.checkpoint)
            if arguments.verify:
                checkpoint.verify()
            report = {**describe(checkpoint), "verified": arguments.verify}
            lines = render(report)
    except MgvqError as error:
        if shows_traceback:
            traceback.print_exc()
        print(f"mgvq-inspect: {error}", file=sys.stderr)
        return EXIT_BAD_FOLDER
    try:
        print(*lines, sep="\n")
        if arguments.json:
            print(json.dumps(report))
        sys.stdout.flush()
    except BrokenPipeError:  # a reader like head has seen enough; nor may Python's exit write more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def plan_for(path: Path, config: EngineConfig) -> MemoryPlan:
    """Plan for a checkpoint as the engine would at its start, from shapes alone.

    Args:
        path: Checkpoint folder.
        config: The engine's settings; a GPU that is not there can be planned for by its
            `gpu_memory_limit`.

    Raises:
        CheckpointError: if the folder is missing, damaged or not ours.
        ConfigError: if a single request would not fit, or nobody says how large a GPU is.
    """
    import torch

    from mgvq_runtime.engine.memory_demand import available_bytes
    from mgvq_runtime.engine.startup import open_for_planning

    num_devices = torch.cuda.device_count()
    is_elsewhere = config.device.startswith("cuda") and not num_devices
    if is_elsewhere and config.gpu_memory_limit is None:
        raise ConfigError(
            f"device={config.device!r} is not on this machine: say how much memory it has with "
            "--gpu-memory-limit, such as 8GiB"
        )
    device = config.device if is_elsewhere else resolve_device(config.device, num_devices)
    opened = open_for_planning(path, config, device)
    limit = config.gpu_memory_limit if is_elsewhere else None
    return opened.plan(config, limit or available_bytes(torch.device(device)))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything the table shows, as JSON values.

    Args:
        checkpoint: an opened folder.

    Returns:
        Names, sizes in bytes, bits a weight by group, bands by stages, memory; "memory" holds
        "unknown" with a reason where the architecture is not one of ours.
    """
    spec = checkpoint.quantization
    matrices = {} if spec is None else spec.matrices
    architectures: Any = checkpoint.config.get("architectures")
    named = isinstance(architectures, list) and len(architectures) > 0
    counts = count_bits(matrices)
    dense_weights = sum(math.prod(tensor.shape) for tensor in checkpoint.dense.values())
    groups = {
        group: {
            "weights": count.weights,
            "bits_per_weight": round(count.bits_per_weight, 4),
            "codes_bits": count.codes,
            "codebooks_bits": count.codebooks,
            "scales_bits": count.scales,
            "permutation_bits": count.permutation,
        }
        for group, count in counts.items()
        if count.weights
    }
    return {
        "path": str(checkpoint.path),
        "architecture": str(architectures[0]) if named else "unknown",
        "format_version": None if spec is None else spec.format_version,
        "parameters": dense_weights + counts[TOTAL].weights,
        "unquantized_parameters": dense_weights,
        "groups": groups,
        "bands": _bands(checkpoint),
        "file_bytes": sum(p.stat().st_size for p in checkpoint.path.iterdir() if p.is_file()),
        "tensor_bytes": sum(f.places[n].size for n, f in checkpoint.files.items()),
        "memory": _memory(checkpoint, dense_weights, counts[TOTAL].bits // 8),
    }


def describe_config(path: Path) -> dict[str, Any]:
    """Return what a model would take, from its config.json alone, as JSON values.

    Args:
        path: config.json.

    Returns:
        Parameters, bits by group and bytes, quantized to 2 bits and in a 16-bit type.

    Raises:
        CheckpointError: if the file is missing or no JSON.
        ConfigError: if the architecture is not one of ours.
    """
    from mgvq_runtime.models.sizes import measure

    config = read_json(path)
    size = measure(config)
    context = min(PLANNED_CONTEXT, size.config.text_config.max_position_embeddings)
    return {
        "path": str(path),
        "architecture": str(config["architectures"][0]),
        "parameters": size.parameters,
        "unquantized_parameters": size.unquantized_parameters,
        "bits_per_weight": {g: round(c.bits_per_weight, 4) for g, c in size.groups.items()},
        "weights": {g: c.weights for g, c in size.groups.items()},
        "dense_half_bytes": size.dense_bytes,
        "mgvq_bytes": size.mgvq_bytes,
        "kv_token_half_bytes": size.kv_token_bytes,
        "context": context,
        "memory_bytes": size.mgvq_bytes + context * size.kv_token_bytes,
    }


def render_config(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table for a config.json."""
    yield f"config        {report['path']}"
    yield f"architecture  {report['architecture']}"
    unquantized = report["unquantized_parameters"]
    yield f"parameters    {report['parameters']:,} ({unquantized:,} of them never quantized)"
    yield ""
    yield f"{'group':<12}{'weights':>17}{'bits/weight':>13}"
    for group, bits in report["bits_per_weight"].items():
        yield f"{group:<12}{report['weights'][group]:>17,}{bits:>13.3f}"
    yield ""
    yield f"weights, 16 bits          {_size(report['dense_half_bytes']):>12}"
    yield f"weights, MGVQ at 2 bits   {_size(report['mgvq_bytes']):>12}"
    yield f"KV cache, a token         {_size(report['kv_token_half_bytes']):>12}"
    yield (
        f"memory needed, at least   {_size(report['memory_bytes']):>12}"
        f"  (one context of {report['context']:,} tokens)"
    )


def render(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table."""
    version = report["format_version"]
    kind = "unquantized" if version is None else f"MGVQ, format version {version}"
    yield f"checkpoint    {report['path']}"
    yield f"architecture  {report['architecture']} ({kind})"
    unquantized = report["unquantized_parameters"]
    yield f"parameters    {report['parameters']:,} ({unquantized:,} of them not quantized)"
    yield f"files         {_size(report['file_bytes'])}"
    if report["verified"]:
        yield "digests       every tensor read" + (", all right" if version is not None else "")
    if report["groups"]:
        yield ""
        yield f"{'group':<12}{'weights':>15}{'bits/weight':>13}  of which codes, codebooks, rest"
        for name, group in report["groups"].items():
            parts = [group["codes_bits"], group["codebooks_bits"]]
            parts.append(group["scales_bits"] + group["permutation_bits"])
            shares = ", ".join(f"{part / group['weights']:.3f}" for part in parts)
            bits = group["bits_per_weight"]
            yield f"{name:<12}{group['weights']:>15,}{bits:>13.3f}  {shares}"
        yield ""
        yield f"{'bands':<12}{'weights':>15}{'share':>13}  stages (vector dimensions)"
        for band in report["bands"]:
            stages = " + ".join(str(dim) for dim in band["vector_dims"])
            if "trellis_window" in band:
                stages = f"trellis, window {band['trellis_window']}"
            weights, share = band["weights"], band["share"]
            yield f"{band['bits']:>2} bit{'':<6}{weights:>15,}{share:>13.1%}  {stages}"
    yield ""
    yield from _render_memory(report["memory"])


def _render_memory(memory: dict[str, Any]) -> Iterator[str]:
    yield f"{'memory':<26}{'float16 (GPU)':>15}{'float32 (CPU)':>15}"
    for label, key in (("weights, at least", "weights"), ("KV cache, a token", "kv_token")):
        if f"{key}_half_bytes" in memory:
            half, full = memory[f"{key}_half_bytes"], memory[f"{key}_float_bytes"]
            yield f"{label:<26}{_size(half):>15}{_size(full):>15}"
    if "unknown" in memory:
        yield f"the KV cache is not known: {memory['unknown']}"
        return
    if memory["max_image_tokens"] is None:
        yield f"largest picture           not known: {memory['image_unknown']}"
    else:
        yield f"largest picture           {memory['max_image_tokens']:,} tokens"
    yield f"longest context           {memory['max_position_embeddings']:,} tokens"


def _bands(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Count weights by the stages of their band, cheapest first."""
    weights: Counter[tuple[Stage, ...]] = Counter()
    matrices = {} if checkpoint.quantization is None else checkpoint.quantization.matrices
    for matrix in matrices.values():
        for band in matrix.layout.bands:
            weights[band.stages] += matrix.layout.out_features * band.width
    total = sum(weights.values())
    bands: list[dict[str, Any]] = []
    for stages, count in weights.items():
        bands.append(
            {
                "vector_dims": [stage.vector_dim for stage in stages],
                "bits": sum(stage.rate for stage in stages),
                "weights": count,
                "share": count / total,
            }
        )
        if stages[0].codec == "trellis":
            bands[-1]["trellis_window"] = stages[0].window
    return sorted(
        bands, key=lambda band: (band["bits"], band["vector_dims"], band.get("trellis_window", 0))
    )


def _memory(checkpoint: Checkpoint, dense_weights: int, quantized_bytes: int) -> dict[str, Any]:
    """Return bytes of weights and KV cache; the tables a backend pads are not in it."""
    from mgvq_runtime.models.registry import find_family

    memory: dict[str, Any] = {
        "weights_half_bytes": quantized_bytes + dense_weights * HALF_BYTES,
        "weights_float_bytes": quantized_bytes + dense_weights * FLOAT_BYTES,
    }
    try:
        family = find_family(checkpoint.config)
        config = family.config.from_hf(checkpoint.config)
    except ConfigError as error:
        return {**memory, "unknown": str(error)}
    text = config.text_config
    kv_numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    memory["kv_token_half_bytes"] = kv_numbers * HALF_BYTES
    memory["kv_token_float_bytes"] = kv_numbers * FLOAT_BYTES
    memory["max_position_embeddings"] = text.max_position_embeddings
    memory["max_image_tokens"] = 0
    if family.image_processor is None:
        return memory
    memory["max_image_tokens"] = None
    try:
        most = family.max_image_tokens
        processor = family.image_processor.from_folder(checkpoint.path, most)
        memory["max_image_tokens"] = processor.max_num_tokens
    except ConfigError as error:
        memory["image_unknown"] = str(error)
    return memory


def _size(count: int) -> str:
    """Write a number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(main())
