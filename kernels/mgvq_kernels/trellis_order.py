"""The order of bytes the Triton kernels read a trellis in (called by `packing`).

Rows go in tiles of 256, and a segment of the stream begins where a tile begins. In a tile lie the
groups of a band one after the other; of a group, its 4-row units of 32 weights: `rate` words of 32
bits, which say all of a unit's windows but for the bits that come in from the word before. The
first words of a tile's 64 units lie together, then the second ones: neighbouring units are
neighbours in memory, a thread loads 16 bytes and 32 threads whole cache lines. What comes in from
above a tile is its halo, a word a group (1.6 % of the codes at 1 bit a weight, 0.3 % at 5): so no
kernel knows of segments, and none takes a row modulo anything.

A word is an integer whose highest bit is the stream's first. Plain torch; compiles nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mgvq_kernels.packed_checks import Expected
from mgvq_kernels.trellis import GROUP_WEIGHTS, HISTORY_BYTES, SEGMENT_ROWS, previous_rows

TILE_ROWS = SEGMENT_ROWS
"""Rows of a tile; rows are padded to whole tiles."""

UNIT_ROWS = 4
"""Rows of a unit: the fewest whose bits fill whole words at every rate."""

BLOCK_GROUPS = 16
"""Groups of a block, the least share of a band a program takes: 128 channels."""

BAND_FIELDS = 9
"""Fields of a band: first block among those of its rate, blocks, rate, window, codebook offset,
first channel, groups, first word, first halo."""

_WORD_BYTES = 4
_TILES_AT_ONCE = 4
"""Tiles whose words are put together at once: more leave a core's cache. At 2 to 5 bits this
is 2.3 to 4.7 times as fast as one permutation of all bytes."""

Bands = Sequence[tuple[int, int, int, int]]
"""(First permuted channel, width, rate, window) of every band."""


def padded_rows(rows: int) -> int:
    """Round output rows up to whole tiles."""
    return math.ceil(rows / TILE_ROWS) * TILE_ROWS


def trellis_tensors(codes: Sequence[Tensor], bands: Bands) -> dict[str, Tensor]:
    """Make everything the Triton kernels read of a trellis beside codebooks and scales.

    Args:
        codes: `[O, width * rate / 8]` uint8 of every band.
        bands: (first permuted channel, width, rate, window) of every band.

    Returns:
        Codes in tiles, halos, the table of bands, and zeroed counters, on the device of the codes.
    """
    device, rows = codes[0].device, codes[0].shape[0]
    rates = [rate for _, _, rate, _ in bands]
    return {
        "codes": torch.cat([to_tiles(*part) for part in zip(codes, rates, strict=True)]),
        "halos": torch.cat([halos(*part) for part in zip(codes, rates, strict=True)]),
        "bands": band_table(rows, bands).to(device),
        "counters": torch.zeros(padded_rows(rows) // TILE_ROWS, dtype=torch.int32, device=device),
    }


def expected_tensors(rows: int, bands: Bands) -> Expected:
    """Say what the kernels read beside what every order has.

    Args:
        rows: O.
        bands: of the matrix.
    """
    codes = sum(band_bytes(rows, width * rate // 8) for _, width, rate, _ in bands)
    return {
        "codes": (codes, torch.uint8),
        "halos": (sum(band_halos(rows, width) for _, width, _, _ in bands), torch.int32),
        "bands": (len(bands) * BAND_FIELDS, torch.int32),
        "counters": (padded_rows(rows) // TILE_ROWS, torch.int32),
    }


def to_tiles(codes: Tensor, rate: int) -> Tensor:
    """Reorder a band's codes from row-major to tiles; missing rows are padded with code 0.

    Args:
        codes: `[O, width * rate / 8]` uint8.
        rate: bits a weight, and bytes a group.

    Returns:
        `[padded_rows * width * rate / 8]` uint8: tile, group, word of a unit, unit, byte.
    """
    rows, units = padded_rows(codes.shape[0]), TILE_ROWS // UNIT_ROWS
    if codes.shape[0] < rows:
        codes = torch.cat([codes, codes.new_zeros(rows - codes.shape[0], codes.shape[1])])
    cut = codes.reshape(rows // TILE_ROWS, units, UNIT_ROWS, -1, rate)  # [tiles, .., groups, rate]
    words = codes.new_empty(len(cut), cut.shape[3], rate, units, dtype=torch.int32)
    for tiles, out in zip(*(torch.split(x, _TILES_AT_ONCE) for x in (cut, words)), strict=True):
        word = codes.new_empty(len(tiles), units, cut.shape[3], _WORD_BYTES)
        for w in range(rate):
            for j in range(_WORD_BYTES):
                row, byte = divmod(w * _WORD_BYTES + j, rate)
                word[..., _WORD_BYTES - 1 - j] = tiles[:, :, row, :, byte]  # the highest comes last
            out[:, :, w] = word.view(torch.int32)[..., 0].transpose(1, 2)
    return words.view(torch.uint8).view(-1)


def from_tiles(flat: Tensor, rows: int, rate: int) -> Tensor:
    """Undo `to_tiles`.

    Args:
        flat: `[padded_rows * width * rate / 8]` uint8.
        rows: O.
        rate: bits a weight.

    Returns:
        `[O, width * rate / 8]` uint8.
    """
    tiles, units = padded_rows(rows) // TILE_ROWS, TILE_ROWS // UNIT_ROWS
    words = flat.view(tiles, -1, rate, units, _WORD_BYTES).transpose(2, 3).flip(4)
    cut = words.reshape(tiles, -1, units, UNIT_ROWS, rate).permute(0, 2, 3, 1, 4)
    return cut.reshape(tiles * TILE_ROWS, -1)[:rows].contiguous()


def halos(codes: Tensor, rate: int) -> Tensor:
    """Read off the bits that come before the first row of every tile.

    Args:
        codes: `[O, width * rate / 8]` uint8.
        rate: bits a weight.

    Returns:
        `[tiles * groups]` int32: the last 16 bits before the tile, the last one lowest.
    """
    previous = previous_rows(codes.shape[0], codes.device)
    above = previous[::TILE_ROWS]  # [tiles]
    stream = torch.stack((codes[previous[above]], codes[above]), 1)  # [tiles, 2, groups * rate]
    cut = stream.view(above.numel(), 2, -1, rate).transpose(1, 2).flatten(2).int()
    high, low = cut[:, :, -HISTORY_BYTES:].unbind(2)  # [tiles, groups]
    return (high << 8 | low).flatten()


def band_bytes(rows: int, row_bytes: int) -> int:
    """Count the bytes of a band's codes in tiles, from those of one of its rows."""
    return padded_rows(rows) * row_bytes


def band_halos(rows: int, width: int) -> int:
    """Count the halos of a band."""
    return padded_rows(rows) // TILE_ROWS * (width // GROUP_WEIGHTS)


def rate_blocks(bands: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Count the blocks of every rate there is; a band's last block may hold fewer groups.

    Args:
        bands: (width, rate) of every band.
    """
    counts: dict[int, int] = {}
    for width, rate in bands:
        counts[rate] = counts.get(rate, 0) + math.ceil(width / (GROUP_WEIGHTS * BLOCK_GROUPS))
    return counts


def band_table(rows: int, bands: Bands) -> Tensor:
    """List the bands of a matrix with what lies where.

    Args:
        rows: O.
        bands: (first permuted channel, width, rate, window) of every band.

    Returns:
        `[B, BAND_FIELDS]` int32.
    """
    fields: list[tuple[int, ...]] = []
    book = word = halo = 0
    for b, (start, width, rate, window) in enumerate(bands):
        first_block = rate_blocks(band[1:3] for band in bands[:b]).get(rate, 0)
        blocks = rate_blocks([(width, rate)])[rate]
        groups = width // GROUP_WEIGHTS
        fields.append((first_block, blocks, rate, window, book, start, groups, word, halo))
        book += 1 << window
        word += band_bytes(rows, width * rate // 8) // 4
        halo += band_halos(rows, width)
    return torch.tensor(fields, dtype=torch.int32)
