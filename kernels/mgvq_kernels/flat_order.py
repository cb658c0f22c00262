"""The order of bytes the Triton kernels read (called by `layout.pack`).

Codes lie row-major, stage after stage, in one buffer; a schedule says where each stage starts, so
that one launch walks a matrix of any bands. Plain torch; compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCHEDULE_FIELDS = 5
"""Fields of a stage: code offset, codes a row, first channel, log2 of the vector dimension,
codebook offset."""


def flat_schedule(out_features: int, stages: Sequence[tuple[int, int, int]]) -> Tensor:
    """List the stages of a matrix in the order their codes lie.

    Args:
        out_features: O.
        stages: (first permuted channel, width, vector dimension) of every stage, band by band.

    Returns:
        `[M, SCHEDULE_FIELDS]` int64.
    """
    fields: list[tuple[int, ...]] = []
    code_offset = book_offset = 0
    for start, width, vector_dim in stages:
        groups, shift = width // vector_dim, vector_dim.bit_length() - 1
        fields.append((code_offset, groups, start, shift, book_offset))
        code_offset += out_features * groups
        book_offset += 256 * vector_dim
    return torch.tensor(fields, dtype=torch.int64)
