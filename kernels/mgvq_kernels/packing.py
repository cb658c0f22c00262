"""From the checkpoint's logical order to a backend's and back, bit for bit (called by all rooms).

The orders themselves are `cpu_order`'s and `block_order`'s, of a trellis `cpu_trellis_order`'s and
`trellis_order`'s; this says which tensors a packed weight is made of. Runs no kernel.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mgvq_kernels import block_order, cpu_order, cpu_trellis_order, trellis_order
from mgvq_kernels.layout import BACKENDS, PackedVQ, VQLayout, VQWeight, stage_list, trellis_bands


def pack(weight: VQWeight, backend: str = "cpu", device: torch.device | str = "cpu") -> PackedVQ:
    """Lay a weight out in a backend's order on a device.

    Does not keep `weight` alive, except where the backend reads the logical order itself.

    Args:
        weight: the matrix in logical order, on any device.
        backend: "reference" (logical order), "cpu" (strips of 64 rows in tiles of 32 groups) or
            "triton" (blocks of 32 groups in atoms of 16 rows; a trellis in tiles of 256 rows).
        device: where the packed tensors go; "cpu" must be a CPU.

    Returns:
        The packed weight; `unpack` gives the same codes, codebooks, scales and permutation back.

    Raises:
        ValueError: if the backend is unknown, or "cpu" is asked for on another device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    is_trellis = weight.layout.codec == "trellis"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' packs for a CPU, got device {device}")
    weight = weight.to(device)
    tensors = _common_tensors(weight)
    flat = [codes for stages in weight.codes for codes in stages]
    if backend == "reference":
        tensors |= {f"codes.{i}": codes.contiguous() for i, codes in enumerate(flat)}
    elif backend == "cpu":
        tensors |= _cpu_trellis_tensors(weight, flat) if is_trellis else _cpu_tensors(weight, flat)
    elif is_trellis:
        tensors |= trellis_order.trellis_tensors(flat, trellis_bands(weight.layout))
    else:
        books = [book for books in weight.codebooks for book in books]
        stages = stage_list(weight.layout)
        tensors |= block_order.block_tensors(flat, books, stages, weight.permutation)
    return PackedVQ(backend, weight.layout, device, tensors)


def unpack(packed: PackedVQ) -> VQWeight:
    """Give back the weight in logical order, bit for bit what `pack` was given.

    Args:
        packed: a weight in any backend's order.

    Returns:
        The weight in logical order, on the packed weight's device.
    """
    layout, tensors = packed.layout, packed.tensors
    codebooks: list[Tensor] = []
    book_offset = 0
    for stage in itertools.chain.from_iterable(band.stages for band in layout.bands):
        size = stage.codebook_size * stage.vector_dim
        book = tensors["codebooks"][book_offset : book_offset + size]
        codebooks.append(book.view(stage.codebook_size, stage.vector_dim))
        book_offset += size
    return VQWeight(
        layout,
        _by_band(layout, _logical_codes(packed)),
        _by_band(layout, codebooks),
        _by_band(layout, list(tensors["codebook_scales"].unbind())),
        tensors["scales"],
        tensors.get("permutation"),
    )


def _logical_codes(packed: PackedVQ) -> list[Tensor]:
    """Put the codes of every stage back in logical order: `[O, width * rate / 8]` each."""
    layout, tensors = packed.layout, packed.tensors
    stages = [stage for band in layout.bands for stage in band.stages]
    if packed.backend == "reference":
        return [tensors[f"codes.{i}"] for i in range(len(stages))]
    codes: list[Tensor] = []
    offset = 0
    for stage, (rows, groups) in zip(stages, _code_shapes(layout), strict=True):
        rest = tensors["codes"][offset:]
        if stage.codec == "trellis" and packed.backend == "triton":
            size = trellis_order.band_bytes(rows, groups)
            codes.append(trellis_order.from_tiles(rest[:size], rows, stage.rate))
        elif stage.codec == "trellis":
            size = rows * groups
            codes.append(cpu_trellis_order.from_planes(rest[:size], rows, stage.rate))
        elif packed.backend == "triton":
            size = block_order.block_bytes(rows, groups)
            codes.append(block_order.from_blocks(rest[:size], rows, groups))
        else:
            size = cpu_order.strip_count(rows) * cpu_order.STRIP_ROWS * groups
            codes.append(cpu_order.from_strips(rest[:size], rows, groups))
        offset += size
    return codes


def _common_tensors(weight: VQWeight) -> dict[str, Tensor]:
    """Everything but the codes: flat codebooks, their scales, row scales, permutation."""
    books = [book.reshape(-1) for stages in weight.codebooks for book in stages]
    scales = [scale for stages in weight.codebook_scales for scale in stages]
    tensors = {
        "codebooks": torch.cat(books),
        "codebook_scales": torch.stack(scales),
        "scales": weight.scales.clone(),
    }
    if weight.permutation is not None:
        tensors["permutation"] = weight.permutation.clone()
    return tensors


def _cpu_tensors(weight: VQWeight, codes: list[Tensor]) -> dict[str, Tensor]:
    """What the cpu kernels read beside the common tensors: codes, float tables, schedule."""
    return {
        "codes": torch.cat([cpu_order.to_strips(part) for part in codes]),
        "tables": cpu_order.scaled_tables(
            [book for books in weight.codebooks for book in books],
            [scale for scales in weight.codebook_scales for scale in scales],
        ),
        "row_scales": weight.scales.float(),
        "tiles": cpu_order.tile_schedule(weight.layout.out_features, stage_list(weight.layout)),
    }


def _cpu_trellis_tensors(weight: VQWeight, codes: list[Tensor]) -> dict[str, Tensor]:
    """What the cpu kernels of a trellis read beside the common tensors."""
    bands = trellis_bands(weight.layout)
    planes = [
        cpu_trellis_order.to_planes(part, rate)
        for part, (_, _, rate, _) in zip(codes, bands, strict=True)
    ]
    return {
        "codes": torch.cat(planes),
        "row_scales": weight.scales.float(),
        "order": cpu_trellis_order.column_order(bands, weight.permutation),
        "bands": cpu_trellis_order.band_table(weight.layout.out_features, bands),
    }


def _code_shapes(layout: VQLayout) -> list[tuple[int, int]]:
    return [
        layout.code_shape(b, s)
        for b, band in enumerate(layout.bands)
        for s in range(len(band.stages))
    ]


def _by_band(layout: VQLayout, flat: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """Cut one list over all stages into a tuple a band."""
    iterator = iter(flat)
    return tuple(tuple(itertools.islice(iterator, len(band.stages))) for band in layout.bands)
