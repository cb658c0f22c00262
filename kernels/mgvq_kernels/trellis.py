"""The bit-shift trellis in plain torch: what its codes mean (called by `reference` and packers).

Eight consecutive permuted channels of a row are a group of `rate` bytes, its first weight in the
highest bits. The bytes of a group, row under row, are one stream of bits, and a weight's codebook
entry is the number its last `window` bits make, its own `rate` bits the lowest: neighbours share
bits, so every weight chooses among all entries and pays for a part of their name. The stream is
circular inside a segment of rows, so nothing starts outside it and any row is decoded from itself
and the two before. Searching for good codes is the quantizer's work.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEGMENT_ROWS = 256
"""Rows of a segment; the last one takes what is left over, and matrices under 512 have one."""

GROUP_WEIGHTS = 8
"""Weights of a group: as many bytes a group as bits a weight."""

HISTORY_BYTES = 2
"""Bytes before a row's own that its windows reach into: 11 bits at most."""


def segments(out_features: int) -> list[tuple[int, int]]:
    """Return first row and end of every segment of a matrix."""
    starts = [SEGMENT_ROWS * i for i in range(max(1, out_features // SEGMENT_ROWS))]
    return list(zip(starts, [*starts[1:], out_features], strict=True))


def previous_rows(out_features: int, device: torch.device | str = "cpu") -> Tensor:
    """Name the row whose bits come before each row's: the one above, or its segment's last.

    Args:
        out_features: O, at least 1.
        device: where the result goes.

    Returns:
        `[O]` int64.
    """
    previous = torch.arange(-1, out_features - 1, device=device)  # [O]
    for start, end in segments(out_features):
        previous[start] = end - 1
    return previous


def windows(codes: Tensor, rate: int, window: int) -> Tensor:
    """Read the codebook entry of every weight off a matrix's codes.

    Args:
        codes: `[O, width * rate / 8]` uint8, all rows of a band.
        rate: bits a weight.
        window: bits of an entry's number.

    Returns:
        `[O, width]` int64 below `2 ** window`.
    """
    rows = torch.arange(codes.shape[0], device=codes.device)
    return row_windows(codes, rows, rate, window)


def row_windows(codes: Tensor, rows: Tensor, rate: int, window: int) -> Tensor:
    """Read the codebook entries of some rows off a matrix's codes.

    Args:
        codes: `[O, width * rate / 8]` uint8, all rows of a band.
        rows: `[T]` int64 in [0, O).
        rate: bits a weight.
        window: bits of an entry's number.

    Returns:
        `[T, width]` int64 below `2 ** window`.
    """
    previous = previous_rows(codes.shape[0], codes.device)
    above = previous[rows]
    own, before = _groups(codes, rows, rate), _groups(codes, above, rate)
    if rate < HISTORY_BYTES:
        before = torch.cat((_groups(codes, previous[above], rate), before), dim=2)
    stream = torch.cat((before[:, :, -HISTORY_BYTES:], own), dim=2)  # [T, groups, 2 + rate]
    word = torch.zeros(stream.shape[:2], dtype=torch.int64, device=codes.device)  # [T, groups]
    for byte in stream.unbind(dim=2):
        word = word << 8 | byte
    ends = torch.arange(GROUP_WEIGHTS - 1, -1, -1, device=codes.device) * rate  # bits after each
    entries = word.unsqueeze(2) >> ends & ((1 << window) - 1)  # [T, groups, 8]
    return entries.flatten(1)


def pack_windows(entries: Tensor, rate: int) -> Tensor:
    """Write the bits every weight adds to the stream, which are its window's lowest.

    Args:
        entries: `[O, width]` int64, windows that agree where they overlap; width a multiple of 8.
        rate: bits a weight.

    Returns:
        `[O, width * rate / 8]` uint8, of which `windows` reads the entries back.
    """
    own = entries.view(entries.shape[0], -1, GROUP_WEIGHTS) & ((1 << rate) - 1)
    word = torch.zeros(own.shape[:2], dtype=torch.int64, device=entries.device)  # [O, groups]
    for bits in own.unbind(dim=2):
        word = word << rate | bits
    shifts = torch.arange(rate - 1, -1, -1, device=entries.device) * 8
    return (word.unsqueeze(2) >> shifts & 255).to(torch.uint8).flatten(1)


def _groups(codes: Tensor, rows: Tensor, rate: int) -> Tensor:
    """Take rows of codes, cut into groups: `[T, groups, rate]` int64."""
    return codes[rows].view(rows.numel(), -1, rate).long()
