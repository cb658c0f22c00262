"""The order of bytes the Triton kernels read (called by `packing`).

Codes go in blocks of 32 groups; in a block, atoms of 16 rows; in an atom, the 16 bytes of each
group one after the other. So one thread reads 16 rows of one group as 16 bytes, a warp reads an
atom, and lane and group agree: a table of partial sums, entries first, is then read without bank
conflicts whatever the codes are. A tile of any number of rows is one run of bytes in each block.

Every stage fills blocks of its own, so a block is of one stage and one kernel serves all bands. The
tables say what its groups stand for; plain torch; compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mgvq_kernels.packed_checks import Expected

BLOCK_GROUPS = 32
"""Groups of a block: one a lane of a warp."""

ATOM_ROWS = 16
"""Rows of an atom: one 16-byte load a thread."""

ROW_MULTIPLE = 512
"""Rows are padded to a multiple of this, the largest tile: no kernel masks a row of codes."""

LEAST_TILE = 64
"""Rows of the smallest tile of any kernel: there is a counter for each."""

STAGE_FIELDS = 6
"""Fields of a stage: first block, blocks, vector dimension, codebook offset, first channel,
groups."""


def padded_rows(rows: int) -> int:
    """Round output rows up to whole tiles."""
    return math.ceil(rows / ROW_MULTIPLE) * ROW_MULTIPLE


def block_tensors(
    codes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    stages: Sequence[tuple[int, int, int]],
    permutation: Tensor | None,
) -> dict[str, Tensor]:
    """Make everything the Triton kernels read beside scales, on the device of the codes.

    Args:
        codes: `[O, G]` uint8 of every stage.
        codebooks: `[256, d]` int8 of every stage.
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.
        permutation: `[I]` int32, or None for the identity.

    Returns:
        Codes in blocks, the codebooks in two more orders, the tables, and zeroed counters.
    """
    device = codes[0].device
    words = word_books([book.cpu() for book in codebooks])
    tables = {
        "word_books": words,
        "diagonal_books": diagonal_books(words),
        "stages": stage_table(stages),
        "sources": channel_sources(stages, permutation),
        "counters": torch.zeros(padded_rows(codes[0].shape[0]) // LEAST_TILE, dtype=torch.int32),
    }
    blocks = torch.cat([to_blocks(part) for part in codes])
    return {"codes": blocks} | {name: table.to(device) for name, table in tables.items()}


def expected_tensors(rows: int, stages: Sequence[tuple[int, int, int]]) -> Expected:
    """Say what the kernels read beside what every order has.

    Args:
        rows: O.
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.
    """
    size = sum(block_bytes(rows, width // vector_dim) for _, width, vector_dim in stages)
    dims = most_dims(vector_dim for _, _, vector_dim in stages)
    return {
        "codes": (size, torch.uint8),
        "word_books": (len(stages) * 256 * dims, torch.int8),
        "diagonal_books": (len(stages) * 256 * 16 * dims, torch.int8),
        "stages": (len(stages) * STAGE_FIELDS, torch.int32),
        "sources": (size // padded_rows(rows) * dims, torch.int32),
        "counters": (padded_rows(rows) // LEAST_TILE, torch.int32),
    }


def to_blocks(codes: Tensor) -> Tensor:
    """Reorder codes from row-major to blocks; missing rows and groups are padded with code 0.

    Args:
        codes: `[O, G]` uint8.

    Returns:
        `[blocks * padded_rows * 32]` uint8.
    """
    rows, groups = codes.shape
    blocks, atoms = math.ceil(groups / BLOCK_GROUPS), padded_rows(rows) // ATOM_ROWS
    whole = codes.new_zeros(atoms * ATOM_ROWS, blocks * BLOCK_GROUPS)
    whole[:rows, :groups] = codes
    cut = whole.view(atoms, ATOM_ROWS, blocks, BLOCK_GROUPS)
    return cut.permute(2, 0, 3, 1).reshape(-1)


def from_blocks(flat: Tensor, rows: int, groups: int) -> Tensor:
    """Undo `to_blocks`.

    Args:
        flat: `[blocks * padded_rows * 32]` uint8.
        rows: O.
        groups: G.

    Returns:
        `[O, G]` uint8.
    """
    atoms = padded_rows(rows) // ATOM_ROWS
    cut = flat.view(-1, atoms, BLOCK_GROUPS, ATOM_ROWS)
    return cut.permute(1, 3, 0, 2).reshape(atoms * ATOM_ROWS, -1)[:rows, :groups].contiguous()


def block_bytes(rows: int, groups: int) -> int:
    """Count the bytes of one stage's codes in blocks."""
    return math.ceil(groups / BLOCK_GROUPS) * BLOCK_GROUPS * padded_rows(rows)


def stage_table(stages: Sequence[tuple[int, int, int]]) -> Tensor:
    """List the stages of a matrix in the order their blocks lie.

    Args:
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.

    Returns:
        `[M, STAGE_FIELDS]` int32.
    """
    fields: list[tuple[int, ...]] = []
    block = book = 0
    for start, width, vector_dim in stages:
        groups = width // vector_dim
        blocks = math.ceil(groups / BLOCK_GROUPS)
        fields.append((block, blocks, vector_dim, book, start, groups))
        block += blocks
        book += 256 * vector_dim
    return torch.tensor(fields, dtype=torch.int32)


def most_dims(vector_dims: Iterable[int]) -> int:
    """Choose the dimension all stages of a matrix are padded to: 4, or 8 where one has 8."""
    return max(4, *vector_dims)


def word_books(codebooks: Sequence[Tensor]) -> Tensor:
    """Pad every codebook to one dimension, so that an entry is one 32- or 64-bit word.

    Args:
        codebooks: `[256, d]` int8 each.

    Returns:
        `[M, 256, dims]` int8.
    """
    dims = most_dims(book.shape[1] for book in codebooks)
    books = torch.zeros(len(codebooks), 256, dims, dtype=torch.int8)
    for m, book in enumerate(codebooks):
        books[m, :, : book.shape[1]] = book
    return books


def diagonal_books(words: Tensor) -> Tensor:
    """Lay codebooks out as the block-diagonal matrices the tensor cores multiply with.

    Row `4 e + b` holds entry e in slice b and zeros in the three others.

    Args:
        words: `[M, 256, dims]` int8.

    Returns:
        `[M, 1024, 4 * dims]` int8.
    """
    count, entries, dims = words.shape
    books = words.new_zeros(count, entries, 4, 4, dims)
    for b in range(4):
        books[:, :, b, b] = words
    return books.view(count, 4 * entries, 4 * dims)


def channel_sources(stages: Sequence[tuple[int, int, int]], permutation: Tensor | None) -> Tensor:
    """Say which input channel stands at each place of each plane; -1 where it is padding.

    A block has `dims` planes of 32: plane j holds channel j of each of its groups. One look-up in
    this table is the permutation, the padding and the order of x in one.

    Args:
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.
        permutation: `[I]` int32, or None for the identity.

    Returns:
        `[blocks * dims * 32]` int32.
    """
    dims = most_dims(vector_dim for _, _, vector_dim in stages)
    parts = []
    for start, width, vector_dim in stages:
        blocks = math.ceil(width // vector_dim / BLOCK_GROUPS)
        channels = torch.full((blocks * BLOCK_GROUPS, dims), -1, dtype=torch.int32)
        local = torch.arange(start, start + width, dtype=torch.int32)
        if permutation is not None:
            local = permutation[start : start + width].cpu()
        channels[: width // vector_dim, :vector_dim] = local.view(-1, vector_dim)
        parts.append(channels.view(blocks, BLOCK_GROUPS, dims).transpose(1, 2).reshape(-1))
    return torch.cat(parts)
