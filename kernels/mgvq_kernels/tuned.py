"""What the tuner found for this GPU: launch options, row limits (called by launchers and `ops`).

`python -m benchmarks.tune` writes `tuned/<gpu>.json`, which is read once, at the first use of a
GPU. An unknown GPU takes the defaults. So does a file that is damaged, or was made by another
triton or for other kernels; that is logged. A table holds warps, pipeline stages and row limits
only, never how a matrix is split: no sum changes its order, and the tuner keeps no option that
changes a bit of a result. Which kernel takes how many rows may differ from the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mgvq_kernels.dispatch import DEFAULT_LIMITS, RowLimits

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"

ALLOWED = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5, 6)}
"""Launch options a table may name, and their values."""

MOST_GEMM_ROWS = 64
"""Rows the largest tile of the GEMM holds."""

NOT_TIMED = ("aot.py", "variants.py", "__init__.py", "trellis_*.py")
"""Files beside the kernels that no table rests on: they do not change what runs, or (a trellis has
no tuned launches yet) no table names what they launch."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What a table was measured on; one that differs in anything is stale."""

    gpu: str
    capability: str
    multiprocessors: int
    triton: str
    source: str
    """Hash of the kernels' source."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Launch options by kernel, and the row limits between kernels."""

    rows: RowLimits = DEFAULT_LIMITS
    launches: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """By kernel, as its launcher names it ("vq_gemv-d4"): num_warps, num_stages."""


_tables: dict[torch.device, Tuned] = {}
"""What is in force, by device; filled at first use."""


def launch_options(device: torch.device, kernel: str, **defaults: int) -> dict[str, int]:
    """Return the options a kernel is launched with: the defaults, tuned ones over them."""
    return {**defaults, **for_device(device).launches.get(kernel, {})}


def for_device(device: torch.device) -> Tuned:
    """Return the table in force for a device, read from its file at first use."""
    if device not in _tables:
        _tables[device] = load(device)
    return _tables[device]


def install(device: torch.device, table: Tuned) -> None:
    """Put a table in force for a device, until the process ends (called by the tuner)."""
    _tables[device] = table


def load(device: torch.device) -> Tuned:
    """Read a device's file.

    Args:
        device: a GPU with its index; anything else has no file.

    Returns:
        The table; the defaults if there is no file, or, with a warning, if it cannot be used.
    """
    if device.type != "cuda":
        return Tuned()
    key = key_of(device)
    path = FOLDER / file_name(key.gpu)
    if not path.exists():
        return Tuned()
    try:
        return read(path, key)
    except (OSError, ValueError) as error:
        logger.warning("%s is not used, kernels run with their defaults: %s", path, error)
        return Tuned()


def read(path: Path, key: Key) -> Tuned:
    """Read and check a table.

    Args:
        path: a file by `write`.
        key: what it must have been measured on.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no table, or holds what no launcher takes, or was measured on
            something else; says what to do.
    """
    try:
        found = json.loads(path.read_text())
        rows = RowLimits(**found["rows"])
        table = Tuned(rows, {str(k): dict(v) for k, v in found["launches"].items()})
        measured_on = Key(**found["key"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"it is damaged ({type(error).__name__}: {error}); run python -m benchmarks.tune again"
        ) from error
    if measured_on != key:
        raise ValueError(f"it was made for {measured_on}, this is {key}; tune again")
    check(table)
    return table


def check(table: Tuned) -> None:
    """Ask for options and limits that launchers take.

    Raises:
        ValueError: naming the kernel and the option.
    """
    limits = (table.rows.gemv, table.rows.gemm)
    if not (all(type(n) is int for n in limits) and 0 <= limits[0] <= limits[1] <= MOST_GEMM_ROWS):
        raise ValueError(f"rows must be 0 <= gemv <= gemm <= {MOST_GEMM_ROWS}, got {table.rows}")
    for kernel, options in table.launches.items():
        for name, value in options.items():
            if name not in ALLOWED or type(value) is not int or value not in ALLOWED[name]:
                raise ValueError(f"{kernel} may take {ALLOWED}, got {name}={value!r}")


def write(path: Path, key: Key, table: Tuned, measured: Mapping[str, Any]) -> None:
    """Write a table and, for people to read, the times it rests on."""
    check(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "key": dataclasses.asdict(key),
        "rows": dataclasses.asdict(table.rows),
        "launches": table.launches,
        "measured": measured,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def key_of(device: torch.device) -> Key:
    """Describe a GPU and the software that compiles for it."""
    found = torch.cuda.get_device_properties(device)
    return Key(
        gpu=found.name,
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        triton=importlib.import_module("triton").__version__,  # whatever its package is called
        source=source_hash(),
    )


@functools.cache
def source_hash() -> str:
    """Hash the source of every kernel and launcher a table may rest on."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "triton").glob("*.py")):
        if not any(path.match(pattern) for pattern in NOT_TIMED):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def file_name(gpu: str) -> str:
    """Name a GPU's file."""
    return f"{slug(gpu)}.json"


def slug(name: str) -> str:
    """Turn a device's name into a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
