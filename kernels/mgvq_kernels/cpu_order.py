"""The order of bytes the cpu kernels read (called by `packing`).

Codes go in tiles of 32 groups; in a tile, strips of 64 rows; in a strip, the 64 bytes of each
group one after the other. So the kernel keeps the partial sums of a tile in L1 and reads codes
strictly forward, one register of 64 rows a load. Numpy does the reordering (2.0 GB/s on one Zen 4
core where torch's byte copies do 0.9, 2026-11); compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mgvq_kernels.packed_checks import Expected

STRIP_ROWS = 64
"""Output rows whose codes lie next to each other: one 512-bit register of bytes."""

TILE_GROUPS = 32
"""Code groups whose partial sums are held at once: two byte planes of them are 16 KiB of L1."""

TOP_FLOATS = 16
"""Floats after each table: the largest magnitude of every dimension, padded to a cache line."""

TILE_FIELDS = 7
"""Fields of a tile: code offset, first channel, groups, vector dimension, table offset, is_first,
is_last (whether the tile belongs to the first and the last stage of its band)."""


def strip_count(rows: int) -> int:
    """Count the strips that hold `rows` output rows."""
    return math.ceil(rows / STRIP_ROWS)


def to_strips(codes: Tensor) -> Tensor:
    """Reorder codes from row-major to tiles of strips; missing rows are padded with code 0.

    Args:
        codes: `[O, G]` uint8.

    Returns:
        `[strips * 64 * G]` uint8.
    """
    rows, groups = codes.shape
    strips = strip_count(rows)
    source = codes.numpy()
    if rows % STRIP_ROWS:
        source = np.pad(source, ((0, strips * STRIP_ROWS - rows), (0, 0)))
    source = source.reshape(strips, STRIP_ROWS, groups)
    flat = np.empty(source.size, np.uint8)
    for place, first, count in _tile_runs(strips, groups):
        run = source[:, :, first : first + count].reshape(
            strips, STRIP_ROWS, -1, min(count, TILE_GROUPS)
        )
        size = strips * STRIP_ROWS * count
        tiles = flat[place : place + size].reshape(-1, strips, min(count, TILE_GROUPS), STRIP_ROWS)
        np.copyto(tiles, run.transpose(2, 0, 3, 1))
    return torch.from_numpy(flat)


def from_strips(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Undo `to_strips`.

    Args:
        flat: `[strips * 64 * G]` uint8.
        rows: O.
        groups: G.

    Returns:
        `[O, G]` uint8.
    """
    strips = strip_count(rows)
    source = flat.numpy()
    codes = np.empty((strips, STRIP_ROWS, groups), np.uint8)
    for place, first, count in _tile_runs(strips, groups):
        size = strips * STRIP_ROWS * count
        tiles = source[place : place + size].reshape(
            -1, strips, min(count, TILE_GROUPS), STRIP_ROWS
        )
        run = codes[:, :, first : first + count]
        run = run.reshape(strips, STRIP_ROWS, -1, min(count, TILE_GROUPS))  # a view: one axis split
        np.copyto(run.transpose(2, 0, 3, 1), tiles)
    return torch.from_numpy(codes.reshape(strips * STRIP_ROWS, groups)[:rows])


def scaled_tables(codebooks: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Make the float tables the kernels multiply with, entries of one dimension side by side.

    Args:
        codebooks: `[256, d]` int8 each.
        scales: `[]` float32 each.

    Returns:
        float32, flat: for each codebook `[d, 256]`, its scale multiplied in, then the largest
        magnitude of each dimension, padded to 16.
    """
    parts = []
    for book, scale in zip(codebooks, scales, strict=True):
        table = (book.float() * scale).t()  # [d, 256]
        tops = torch.zeros(TOP_FLOATS, device=table.device)
        tops[: table.shape[0]] = table.abs().amax(dim=1)
        parts += [table.reshape(-1), tops]
    return torch.cat(parts)


def tile_schedule(out_features: int, stages: Sequence[tuple[int, int, int]]) -> Tensor:
    """List the tiles of a matrix in the order their codes lie.

    Args:
        out_features: O.
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.

    Returns:
        `[num_tiles, TILE_FIELDS]` int64.
    """
    padded = strip_count(out_features) * STRIP_ROWS
    tiles: list[tuple[int, ...]] = []
    code_offset = table_offset = 0
    for i, (start, width, vector_dim) in enumerate(stages):
        is_first = int(i == 0 or stages[i - 1][0] != start)
        is_last = int(i + 1 == len(stages) or stages[i + 1][0] != start)
        groups = width // vector_dim
        for first in range(0, groups, TILE_GROUPS):
            count = min(TILE_GROUPS, groups - first)
            channel = start + first * vector_dim
            tiles.append((code_offset, channel, count, vector_dim, table_offset, is_first, is_last))
            code_offset += padded * count
        table_offset += 256 * vector_dim + TOP_FLOATS
    return torch.tensor(tiles, dtype=torch.int64)


def expected_tensors(rows: int, stages: Sequence[tuple[int, int, int]]) -> Expected:
    """Say what the kernels read beside what every order has: they check nothing themselves.

    Args:
        rows: O.
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.
    """
    groups = [width // vector_dim for _, width, vector_dim in stages]
    tables = sum(256 * vector_dim + TOP_FLOATS for _, _, vector_dim in stages)
    tiles = sum(math.ceil(count / TILE_GROUPS) for count in groups) * TILE_FIELDS
    return {
        "codes": (strip_count(rows) * STRIP_ROWS * sum(groups), torch.uint8),
        "tables": (tables, torch.float32),
        "row_scales": (rows, torch.float32),
        "tiles": (tiles, torch.int64),
    }


def describe(tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
    """Write down where everything of one matrix lies, so that a call passes one number.

    The tensors must outlive the descriptor and stay where they are: `layout.PackedVQ` holds them.

    Args:
        tensors: checked.
        in_features: I.

    Returns:
        `[8]` int64: five addresses (the fourth 0 without permutation), then num_tiles, O, I.
    """
    names = ("codes", "tables", "row_scales", "permutation", "tiles")
    addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in names]
    counts = [tensors["tiles"].shape[0], tensors["row_scales"].shape[0], in_features]
    return torch.tensor(addresses + counts, dtype=torch.int64)


def _tile_runs(strips: int, groups: int) -> list[tuple[int, int, int]]:
    """List (offset, first group, groups) of the whole tiles together and of the ragged one."""
    whole = groups // TILE_GROUPS * TILE_GROUPS
    runs = [(0, 0, whole), (strips * STRIP_ROWS * whole, whole, groups - whole)]
    return [run for run in runs if run[2]]
