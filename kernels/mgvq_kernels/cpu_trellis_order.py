"""The order of bytes the cpu kernels read a trellis in (called by `packing` and `layout`).

Codes stay row by row; in a row of a band, the first bytes of all groups come first, then the second
ones. So neighbouring groups are neighbours in every register, and the bits that come before a row's
own are runs of bytes of the rows above. Columns follow: the first weights of all groups, then the
second ones. Takes as much memory as the checkpoint. Numpy does the reordering, as in
`cpu_order`; compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mgvq_kernels.packed_checks import Expected
from mgvq_kernels.trellis import GROUP_WEIGHTS

Bands = Sequence[tuple[int, int, int, int]]
"""First permuted channel, width, rate and window of every band."""

BAND_FIELDS = 6
"""Fields of a band: code offset, first column, groups, rate, window, codebook offset."""


def to_planes(codes: Tensor, rate: int) -> Tensor:
    """Reorder codes from groups side by side to their first bytes, second bytes and so on.

    Args:
        codes: `[O, groups * rate]` uint8.
        rate: bytes of a group.

    Returns:
        `[O * rate * groups]` uint8.
    """
    groups = codes.numpy().reshape(codes.shape[0], -1, rate)  # [O, groups, rate]
    return torch.from_numpy(np.ascontiguousarray(groups.transpose(0, 2, 1)).reshape(-1))


def from_planes(flat: Tensor, rows: int, rate: int) -> Tensor:
    """Undo `to_planes`.

    Args:
        flat: `[O * rate * groups]` uint8.
        rows: O.
        rate: bytes of a group.

    Returns:
        `[O, groups * rate]` uint8.
    """
    return flat.view(rows, rate, -1).transpose(1, 2).reshape(rows, -1)


def column_order(bands: Bands, permutation: Tensor | None) -> Tensor:
    """Name the original channel that each of the kernels' columns stands for.

    Args:
        bands: of the matrix.
        permutation: `[I]` int32, or None for the identity.

    Returns:
        `[I]` int32.
    """
    parts = [
        torch.arange(start, start + width, dtype=torch.int32)
        .view(-1, GROUP_WEIGHTS)
        .t()
        .reshape(-1)
        for start, width, _, _ in bands
    ]
    channels = torch.cat(parts)
    return channels if permutation is None else permutation[channels.long()]


def band_table(out_features: int, bands: Bands) -> Tensor:
    """List the bands of a matrix in the order their codes lie.

    Args:
        out_features: O.
        bands: of the matrix.

    Returns:
        `[num_bands, BAND_FIELDS]` int64.
    """
    fields = []
    code_offset = book_offset = 0
    for start, width, rate, window in bands:
        groups = width // GROUP_WEIGHTS
        fields.append((code_offset, start, groups, rate, window, book_offset))
        code_offset += out_features * groups * rate
        book_offset += 1 << window
    return torch.tensor(fields, dtype=torch.int64)


def expected_tensors(rows: int, bands: Bands) -> Expected:
    """Say what the kernels read beside what every order has: they check nothing themselves.

    Args:
        rows: O.
        bands: of the matrix.
    """
    codes = sum(rows * width * rate // GROUP_WEIGHTS for _, width, rate, _ in bands)
    return {
        "codes": (codes, torch.uint8),
        "row_scales": (rows, torch.float32),
        "order": (sum(width for _, width, _, _ in bands), torch.int32),
        "bands": (len(bands) * BAND_FIELDS, torch.int64),
    }


def describe(tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
    """Write down where everything of one matrix lies, so that a call passes one number.

    The tensors must outlive the descriptor and stay where they are: `layout.PackedVQ` holds them.

    Args:
        tensors: checked.
        in_features: I.

    Returns:
        `[9]` int64: six addresses, then the number of bands, O and I.
    """
    names = ("codes", "codebooks", "codebook_scales", "row_scales", "order", "bands")
    addresses = [tensors[name].data_ptr() for name in names]
    counts = [tensors["bands"].shape[0], tensors["row_scales"].shape[0], in_features]
    return torch.tensor(addresses + counts, dtype=torch.int64)
