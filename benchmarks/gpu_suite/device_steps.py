"""Steps that describe the GPU: facts, bandwidth of a copy, cost of a launch (called by the worker).

The bandwidth is what every other time is compared with, so it is measured first, by the same clock.
"""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch
import triton

from benchmarks.gpu_suite.launches import launch_empty
from benchmarks.gpu_suite.place import Place
from benchmarks.gpu_suite.steps import Row, Step

COPY_BYTES = 512 << 20
"""Bytes of the buffer that is copied: far more than any L2 cache."""

QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"


def device_steps(place: Place) -> list[Step]:
    """List the steps, none of which may be dropped before the others."""
    steps = [Step("device", 0, 2, functools.partial(facts, place))]
    if place.is_gpu:
        steps.append(Step("copy bandwidth", 0, 3, functools.partial(copy_bandwidth, place)))
        steps.append(Step("launch cost", 0, 5, functools.partial(launch_cost, place)))
    return steps


def facts(place: Place) -> Iterator[Row]:
    """Name the device, what it has and what it runs on."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions |= {"python": platform.python_version()}
    if not place.is_gpu:
        yield {"kind": "device", "name": "Triton interpreter on a CPU", **versions}
        return
    found = torch.cuda.get_device_properties(place.device)
    yield {
        "kind": "device",
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        **versions,
        **driver_facts(),
    }


def driver_facts() -> dict[str, str]:
    """Ask nvidia-smi for driver, clocks (MHz) and power limit; empty where it is not there."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    query = [command, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "--id=0"]
    asked = subprocess.run(query, capture_output=True, text=True, timeout=30)
    values = asked.stdout.strip().split(", ")
    return dict(zip(QUERY.split(","), values, strict=True)) if asked.returncode == 0 else {}


def copy_bandwidth(place: Place) -> Iterator[Row]:
    """Copy a large buffer on the device; bytes read and bytes written both count."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    timing = place.clock.time([lambda: target.copy_(source)])
    if timing is not None:
        yield {"kind": "copy", "gb_s": round(2 * COPY_BYTES / timing.us / 1e3, 1)}


def launch_cost(place: Place) -> Iterator[Row]:
    """Time an empty Triton kernel as a node of a graph, alone and overlapped (from sm_90)."""
    x = torch.zeros(16, device=place.device)
    overlaps = torch.cuda.get_device_capability(place.device) >= (9, 0)
    for is_overlapped in (False, True)[: 1 + overlaps]:
        call = functools.partial(launch_empty, x, is_overlapped)
        timing = place.clock.time([call] * 500)
        if timing is not None:
            name = "empty kernel, programmatic launch" if is_overlapped else "empty kernel"
            yield {"kind": "launch", "variant": name, "us": round(timing.us, 3)}
