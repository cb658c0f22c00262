"""Bands, stages and packed weights: the vocabulary every kernel shares (called by all rooms).

`VQLayout` says how a matrix is cut, `VQWeight` holds it in the checkpoint's logical order and
`PackedVQ` in one backend's order; `pack` and `unpack` go between the two, bit for bit. One byte is
one codeword, always: a stage of vector dimension d spends 8/d bits a weight. Knows no file and
no kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels import block_order, cpu_order

CODEBOOK_SIZE = 256
"""Entries of every codebook: one uint8 code addresses all of them."""

VECTOR_DIMS = (8, 4, 2, 1)
"""Vector dimensions a stage may have: 1, 2, 4 and 8 bits a weight."""

RATE_STAGES: Mapping[int, tuple[int, ...]] = {1: (8,), 2: (4,), 3: (4, 8), 4: (2,), 8: (1,)}
"""Stages (by vector dimension) that spend a whole number of bits a weight."""

BACKENDS = ("reference", "cpu", "triton")
"""Orders in which `pack` can lay a weight out."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One codebook of a band: 256 entries of `vector_dim` weights, one code byte a vector."""

    vector_dim: int
    codec: str = "lookup"

    def __post_init__(self) -> None:
        if self.vector_dim not in VECTOR_DIMS:
            raise ValueError(f"vector_dim must be one of {VECTOR_DIMS}, got {self.vector_dim}")
        if self.codec != "lookup":
            raise NotImplementedError(f"codec {self.codec!r} is not known; known: 'lookup'")


@dataclasses.dataclass(frozen=True)
class Band:
    """A run of `width` consecutive permuted input channels whose weight is a sum of stages."""

    start: int
    width: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if self.width <= 0 or self.width % 8:
            raise ValueError(f"band width must be a positive multiple of 8, got {self.width}")
        if not self.stages:
            raise ValueError(f"the band at channel {self.start} has no stage")

    @property
    def codes_per_row(self) -> int:
        """Code bytes this band spends on one output row."""
        return sum(self.width // stage.vector_dim for stage in self.stages)

    @property
    def rate(self) -> int:
        """Bits this band spends on one weight."""
        return sum(8 // stage.vector_dim for stage in self.stages)


@dataclasses.dataclass(frozen=True)
class VQLayout:
    """How a matrix `[O, I]` is cut into bands and stages; shape facts only, no tensor."""

    out_features: int
    in_features: int
    bands: tuple[Band, ...]
    has_permutation: bool = False

    def __post_init__(self) -> None:
        if self.out_features <= 0 or self.in_features <= 0:
            raise ValueError(
                f"shape must be positive, got [{self.out_features}, {self.in_features}]"
            )
        if not self.bands:
            raise ValueError("a layout needs at least one band")
        multiple = 32 if self.in_features <= 1024 else 128
        start = 0
        for band in self.bands:
            if band.start != start:
                raise ValueError(f"band starts at channel {band.start}, expected {start}")
            start += band.width
            if band is not self.bands[-1] and band.width % multiple:
                raise ValueError(
                    f"band at channel {band.start} is {band.width} wide; all but the last must be "
                    f"a multiple of {multiple} where in_features is {self.in_features}"
                )
        if start != self.in_features:
            raise ValueError(f"bands cover {start} channels, in_features is {self.in_features}")

    @classmethod
    def uniform(
        cls, out_features: int, in_features: int, rate: int, has_permutation: bool = False
    ) -> VQLayout:
        """Make the layout with one band that spends `rate` bits on every weight.

        Args:
            out_features: rows of the matrix.
            in_features: columns of the matrix, a multiple of 8.
            rate: bits a weight: 1, 2, 3, 4 or 8.
            has_permutation: whether the input channels are permuted.

        Raises:
            ValueError: if `rate` is not one of `RATE_STAGES`, or `in_features` no multiple of 8.
        """
        if rate not in RATE_STAGES:
            raise ValueError(f"rate must be one of {sorted(RATE_STAGES)}, got {rate}")
        stages = tuple(Stage(vector_dim) for vector_dim in RATE_STAGES[rate])
        return cls(out_features, in_features, (Band(0, in_features, stages),), has_permutation)

    @property
    def num_weights(self) -> int:
        """Weights of the dense matrix."""
        return self.out_features * self.in_features

    @property
    def num_codebooks(self) -> int:
        """Codebooks over all bands and stages."""
        return sum(len(band.stages) for band in self.bands)

    @property
    def codes_per_row(self) -> int:
        """Code bytes of one output row."""
        return sum(band.codes_per_row for band in self.bands)

    def code_bits(self) -> int:
        """Count the bits of all codes."""
        return 8 * self.out_features * self.codes_per_row

    def codebook_bits(self) -> int:
        """Count the bits of the codebooks and their scales, as if this matrix shared none."""
        dims = [stage.vector_dim for band in self.bands for stage in band.stages]
        return sum(CODEBOOK_SIZE * vector_dim * 8 + 32 for vector_dim in dims)

    def side_bits(self) -> int:
        """Count the bits of row scales and permutation."""
        return 16 * self.out_features + (32 * self.in_features if self.has_permutation else 0)

    def code_shape(self, band: int, stage: int) -> tuple[int, int]:
        """Return the shape `[O, width/d]` of one code tensor."""
        width, vector_dim = self.bands[band].width, self.bands[band].stages[stage].vector_dim
        return (self.out_features, width // vector_dim)


@dataclasses.dataclass(frozen=True, eq=False)
class VQWeight:
    """A quantized matrix in the checkpoint's logical order, checked on construction.

    `W[o, permutation[j]] = scales[o] * sum over the stages of j's band of
    codebook_scale * codebook[code[o, (j - start) // d], (j - start) % d]`,
    where j counts permuted channels and `start` is the band's first.
    """

    layout: VQLayout
    codes: tuple[tuple[Tensor, ...], ...]
    """[band][stage]: `[O, width/d]` uint8."""
    codebooks: tuple[tuple[Tensor, ...], ...]
    """[band][stage]: `[256, d]` int8; matrices may share one tensor."""
    codebook_scales: tuple[tuple[Tensor, ...], ...]
    """[band][stage]: `[]` float32."""
    scales: Tensor
    """`[O]` float16."""
    permutation: Tensor | None = None
    """`[I]` int32: the original channel at each permuted place; None means the identity."""

    def __post_init__(self) -> None:
        layout = self.layout
        for name in ("codes", "codebooks", "codebook_scales"):
            counts = [len(stages) for stages in getattr(self, name)]
            expected = [len(band.stages) for band in layout.bands]
            if counts != expected:
                raise ValueError(
                    f"{name} holds {counts} stages per band, the layout has {expected}"
                )
        for b, band in enumerate(layout.bands):
            for s, stage in enumerate(band.stages):
                where = f"[{b}][{s}]"
                _expect(f"codes{where}", self.codes[b][s], layout.code_shape(b, s), torch.uint8)
                shape = (CODEBOOK_SIZE, stage.vector_dim)
                _expect(f"codebooks{where}", self.codebooks[b][s], shape, torch.int8)
                _expect(f"codebook_scales{where}", self.codebook_scales[b][s], (), torch.float32)
        _expect("scales", self.scales, (layout.out_features,), torch.float16)
        if (self.permutation is not None) != layout.has_permutation:
            raise ValueError(
                f"permutation is {'given' if self.permutation is not None else 'missing'}, "
                f"layout.has_permutation is {layout.has_permutation}"
            )
        if self.permutation is not None:
            _expect("permutation", self.permutation, (layout.in_features,), torch.int32)
            ordered = torch.sort(self.permutation).values.cpu()
            if not torch.equal(ordered, torch.arange(layout.in_features, dtype=torch.int32)):
                raise ValueError("permutation does not name every input channel exactly once")

    def to(self, device: torch.device | str) -> VQWeight:
        """Return the same weight with every tensor on `device`."""
        move = _nested_map(lambda tensor: tensor.to(device))
        return VQWeight(
            self.layout,
            move(self.codes),
            move(self.codebooks),
            move(self.codebook_scales),
            self.scales.to(device),
            None if self.permutation is None else self.permutation.to(device),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PackedVQ:
    """A quantized matrix in one backend's order, ready for `ops.vq_linear`; made by `pack`."""

    backend: str
    layout: VQLayout
    device: torch.device
    tensors: Mapping[str, Tensor]
    """What the backend reads, by name; `nbytes` counts them all. Never resize one in place."""
    address: int = dataclasses.field(init=False, default=0)
    """Where the cpu kernels find the descriptor of everything above; 0 for other backends."""
    num_codes: int = dataclasses.field(init=False, default=0)
    """Codes of the matrix, counted once."""
    strips: int = dataclasses.field(init=False, default=0)
    """Strips of output rows in the cpu order."""

    def __post_init__(self) -> None:
        layout = self.layout
        object.__setattr__(self, "num_codes", layout.out_features * layout.codes_per_row)
        object.__setattr__(self, "strips", cpu_order.strip_count(layout.out_features))
        if self.backend == "triton":
            block_order.check(self.tensors, layout.out_features, stage_list(layout))
        if self.backend != "cpu":
            return
        stages = stage_list(layout)
        cpu_order.check(self.tensors, layout.out_features, stages, layout.has_permutation)
        descriptor = cpu_order.describe(
            self.tensors["codes"],
            self.tensors["tables"],
            self.tensors["row_scales"],
            self.tensors.get("permutation"),
            self.tensors["tiles"],
            self.layout.in_features,
        )
        object.__setattr__(self, "tensors", {**self.tensors, "descriptor": descriptor})
        object.__setattr__(self, "address", descriptor.data_ptr())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by making the descriptor anew: addresses do not travel."""
        return (PackedVQ, (self.backend, self.layout, self.device, dict(self.tensors)))

    @property
    def nbytes(self) -> int:
        """Bytes this weight holds in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack(weight: VQWeight, backend: str = "cpu", device: torch.device | str = "cpu") -> PackedVQ:
    """Lay a weight out in a backend's order on a device.

    Does not keep `weight` alive, except where the backend reads the logical order itself.

    Args:
        weight: the matrix in logical order, on any device.
        backend: "reference" (logical order), "cpu" (strips of 64 rows in tiles of 32 groups) or
            "triton" (blocks of 32 groups in atoms of 16 rows).
        device: where the packed tensors go; "cpu" must be a CPU.

    Returns:
        The packed weight; `unpack` gives the same codes, codebooks, scales and permutation back.

    Raises:
        ValueError: if the backend is unknown, or "cpu" is asked for on another device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
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
        tensors |= _cpu_tensors(weight, flat)
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
    codes: list[Tensor] = []
    codebooks: list[Tensor] = []
    offset = book_offset = 0
    for i, (rows, groups) in enumerate(_code_shapes(layout)):
        if packed.backend == "reference":
            codes.append(tensors[f"codes.{i}"])
        elif packed.backend == "cpu":
            size = cpu_order.strip_count(rows) * cpu_order.STRIP_ROWS * groups
            flat = tensors["codes"][offset : offset + size]
            codes.append(cpu_order.from_strips(flat, rows, groups))
        else:
            size = block_order.block_bytes(rows, groups)
            flat = tensors["codes"][offset : offset + size]
            codes.append(block_order.from_blocks(flat, rows, groups))
        offset += 0 if packed.backend == "reference" else size
    for stage in itertools.chain.from_iterable(band.stages for band in layout.bands):
        size = CODEBOOK_SIZE * stage.vector_dim
        book = tensors["codebooks"][book_offset : book_offset + size]
        codebooks.append(book.view(CODEBOOK_SIZE, stage.vector_dim))
        book_offset += size
    return VQWeight(
        layout,
        _by_band(layout, codes),
        _by_band(layout, codebooks),
        _by_band(layout, list(tensors["codebook_scales"].unbind())),
        tensors["scales"],
        tensors.get("permutation"),
    )


def stage_list(layout: VQLayout) -> list[tuple[int, int, int]]:
    """List (first permuted channel, width, vector dimension) of every stage, band by band."""
    return [
        (band.start, band.width, stage.vector_dim) for band in layout.bands for stage in band.stages
    ]


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


def _nested_map(function: Any) -> Any:
    return lambda nested: tuple(tuple(function(tensor) for tensor in stages) for stages in nested)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
