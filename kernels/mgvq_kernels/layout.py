"""Bands, stages and packed weights: the vocabulary every kernel shares (called by all rooms).

`VQLayout` says how a matrix is cut, `VQWeight` holds it in the checkpoint's logical order and
`PackedVQ` in one backend's order; `packing` goes between the two, bit for bit. A stage is coded in
one of two ways. "lookup": one byte is one codeword, so a stage of vector dimension d spends 8/d
bits a weight, and stages may be summed. "trellis": a weight's codeword is named by the last
`window` bits of a stream of `rate` bits a weight (`trellis` has the definition); a matrix is coded
in one way throughout. Knows no file and no kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mgvq_kernels import block_order, cpu_order, cpu_trellis_order, trellis_order
from mgvq_kernels.packed_checks import Expected, check_tensors

VECTOR_DIMS = (8, 4, 2, 1)
"""Vector dimensions a lookup stage may have: 1, 2, 4 and 8 bits a weight."""

LOOKUP_WINDOW = 8
"""Bits that name a codeword of a lookup stage: one uint8 code addresses all 256."""

RATE_STAGES: Mapping[int, tuple[int, ...]] = {1: (8,), 2: (4,), 3: (4, 8), 4: (2,), 8: (1,)}
"""Lookup stages (by vector dimension) that spend a whole number of bits a weight."""

TRELLIS_RATES = (1, 2, 3, 4, 5)
"""Bits a weight a trellis may spend."""

TRELLIS_WINDOWS = (8, 9, 10, 11, 12)
"""Bits that may name a codeword of a trellis; the table has two to that power entries."""

TRELLIS_WINDOW = 12
"""The window of a trellis where nobody names one: the least error of those allowed."""

CODECS = ("lookup", "trellis")
"""Ways to code a matrix."""

BACKENDS = ("reference", "cpu", "triton")
"""Orders in which `packing.pack` can lay a weight out."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One codebook of a band, and how its entries are named."""

    vector_dim: int
    """Weights of one codebook entry; 1 in a trellis."""
    codec: str = "lookup"
    rate: int = 0
    """Bits a weight; 0 stands for the only choice of a lookup stage, 8 / vector_dim."""
    window: int = LOOKUP_WINDOW
    """Bits that name a codebook entry."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise NotImplementedError(f"codec {self.codec!r} is not known; known: {CODECS}")
        if self.codec == "trellis":
            self._check_trellis()
            return
        if self.vector_dim not in VECTOR_DIMS:
            raise ValueError(f"vector_dim must be one of {VECTOR_DIMS}, got {self.vector_dim}")
        if self.rate not in (0, 8 // self.vector_dim) or self.window != LOOKUP_WINDOW:
            raise ValueError(
                f"a lookup stage of vector_dim {self.vector_dim} has rate {8 // self.vector_dim} "
                f"and window {LOOKUP_WINDOW}, got rate {self.rate} and window {self.window}"
            )
        object.__setattr__(self, "rate", 8 // self.vector_dim)

    def _check_trellis(self) -> None:
        if self.vector_dim != 1:
            raise ValueError(f"vector_dim must be 1 in a trellis stage, got {self.vector_dim}")
        if self.rate not in TRELLIS_RATES:
            raise ValueError(f"rate must be one of {TRELLIS_RATES} in a trellis, got {self.rate}")
        if self.window not in TRELLIS_WINDOWS:
            raise ValueError(
                f"window must be one of {TRELLIS_WINDOWS} in a trellis, got {self.window}"
            )

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return 1 << self.window


def rate_stages(
    rate: int, codec: str = "lookup", window: int = TRELLIS_WINDOW
) -> tuple[Stage, ...]:
    """Make the stages that spend a whole number of bits a weight.

    Args:
        rate: bits a weight: 1, 2, 3, 4, 5 in a trellis only, 8 with lookups only.
        codec: a name of `CODECS`.
        window: bits that name a codeword of a trellis; lookups have no choice.

    Raises:
        ValueError: if `rate` or `window` is not one the codec has.
        NotImplementedError: if the codec is not known.
    """
    if codec != "lookup":
        return (Stage(1, codec, rate, window),)
    if rate not in RATE_STAGES:
        raise ValueError(f"rate must be one of {sorted(RATE_STAGES)}, got {rate}")
    return tuple(Stage(vector_dim) for vector_dim in RATE_STAGES[rate])


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
        if len(self.stages) > 1 and any(stage.codec == "trellis" for stage in self.stages):
            raise ValueError(
                f"the band at channel {self.start} has {len(self.stages)} stages; a trellis stands "
                f"alone"
            )

    @property
    def codes_per_row(self) -> int:
        """Code bytes this band spends on one output row."""
        return sum(self.width * stage.rate // 8 for stage in self.stages)

    @property
    def rate(self) -> int:
        """Bits this band spends on one weight."""
        return sum(stage.rate for stage in self.stages)


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
        codecs = {stage.codec for band in self.bands for stage in band.stages}
        if len(codecs) > 1:
            raise ValueError(f"a matrix is coded in one way, got bands of {sorted(codecs)}")
        if codecs == {"trellis"} and self.out_features < 2:
            raise ValueError("a trellis runs down the rows and needs 2 of them, got 1")
        if start != self.in_features:
            raise ValueError(f"bands cover {start} channels, in_features is {self.in_features}")

    @classmethod
    def uniform(
        cls,
        out_features: int,
        in_features: int,
        rate: int,
        has_permutation: bool = False,
        codec: str = "lookup",
        window: int = TRELLIS_WINDOW,
    ) -> VQLayout:
        """Make the layout with one band that spends `rate` bits on every weight.

        Args:
            out_features: rows of the matrix.
            in_features: columns of the matrix, a multiple of 8.
            rate: bits a weight, as `rate_stages` takes it.
            has_permutation: whether the input channels are permuted.
            codec: a name of `CODECS`.
            window: bits that name a codeword of a trellis.

        Raises:
            ValueError: if the codec has no such rate or window, or `in_features` is no multiple
                of 8.
        """
        band = Band(0, in_features, rate_stages(rate, codec, window))
        return cls(out_features, in_features, (band,), has_permutation)

    @functools.cached_property
    def codec(self) -> str:
        """How every stage of the matrix is coded: a name of `CODECS`."""
        return self.bands[0].stages[0].codec

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
        stages = [stage for band in self.bands for stage in band.stages]
        return sum(stage.codebook_size * stage.vector_dim * 8 + 32 for stage in stages)

    @property
    def channel_bits(self) -> int:
        """Bits that name a channel in a stored permutation; lookups always take 32."""
        return 16 if self.codec == "trellis" and self.in_features <= 1 << 15 else 32

    def side_bits(self) -> int:
        """Count the bits of row scales and permutation."""
        order = self.channel_bits * self.in_features if self.has_permutation else 0
        return 16 * self.out_features + order

    def code_shape(self, band: int, stage: int) -> tuple[int, int]:
        """Return the shape `[O, width * rate / 8]` of one code tensor."""
        width, rate = self.bands[band].width, self.bands[band].stages[stage].rate
        return (self.out_features, width * rate // 8)


@dataclasses.dataclass(frozen=True, eq=False)
class VQWeight:
    """A quantized matrix in the checkpoint's logical order, checked on construction.

    `W[o, permutation[j]] = scales[o] * sum over the stages of j's band of
    codebook_scale * codebook[code[o, (j - start) // d], (j - start) % d]`,
    where j counts permuted channels and `start` is the band's first. In a trellis the entry is
    `trellis.windows(code)[o, j - start]`, and d is 1.
    """

    layout: VQLayout
    codes: tuple[tuple[Tensor, ...], ...]
    """[band][stage]: `[O, width * rate / 8]` uint8."""
    codebooks: tuple[tuple[Tensor, ...], ...]
    """[band][stage]: `[2 ** window, d]` int8; matrices may share one tensor."""
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
                shape = (stage.codebook_size, stage.vector_dim)
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
        if self.backend == "reference":
            return
        check_tensors(self.tensors, self._expected(), is_aligned=self.backend == "triton")
        if self.backend != "cpu":
            return
        order = cpu_trellis_order if layout.codec == "trellis" else cpu_order
        descriptor = order.describe(self.tensors, layout.in_features)
        object.__setattr__(self, "tensors", {**self.tensors, "descriptor": descriptor})
        object.__setattr__(self, "address", descriptor.data_ptr())

    def _expected(self) -> Expected:
        """Say which tensors the order of the backend has."""
        layout, is_cpu = self.layout, self.backend == "cpu"
        stages = [stage for band in layout.bands for stage in band.stages]
        entries = sum(stage.codebook_size * stage.vector_dim for stage in stages)
        expected = {
            "codebooks": (entries, torch.int8),
            "codebook_scales": (len(stages), torch.float32),
            "scales": (layout.out_features, torch.float16),
        }
        if layout.has_permutation:
            expected["permutation"] = (layout.in_features, torch.int32)
        if layout.codec == "trellis":
            trellis = cpu_trellis_order if is_cpu else trellis_order
            return expected | trellis.expected_tensors(layout.out_features, trellis_bands(layout))
        lookups = cpu_order if is_cpu else block_order
        return expected | lookups.expected_tensors(layout.out_features, stage_list(layout))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by making the descriptor anew: addresses do not travel."""
        return (PackedVQ, (self.backend, self.layout, self.device, dict(self.tensors)))

    @property
    def nbytes(self) -> int:
        """Bytes this weight holds in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def stage_list(layout: VQLayout) -> list[tuple[int, int, int]]:
    """List (first permuted channel, width, vector dimension) of every stage, band by band."""
    return [
        (band.start, band.width, stage.vector_dim) for band in layout.bands for stage in band.stages
    ]


def trellis_bands(layout: VQLayout) -> list[tuple[int, int, int, int]]:
    """List (first permuted channel, width, rate, window) of every band of a trellis."""
    return [
        (band.start, band.width, stage.rate, stage.window)
        for band in layout.bands
        for stage in band.stages
    ]


def _nested_map(function: Any) -> Any:
    return lambda nested: tuple(tuple(function(tensor) for tensor in stages) for stages in nested)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
