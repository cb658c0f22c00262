"""Layouts are validated by name and number; packing is exact in every backend's order."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels import layout as layouts
from mgvq_kernels.layout import Band, PackedVQ, Stage, VQLayout, VQWeight
from mgvq_kernels.packing import pack, unpack
from tests.kernels.random_weights import random_weight

STAGES = st.sampled_from([(8,), (4,), (4, 8), (2,), (1,), (8, 8), (1, 2, 8)])


@st.composite
def drawn_layouts(draw: st.DrawFn) -> VQLayout:
    widths = [32 * draw(st.integers(1, 9)) for _ in range(draw(st.integers(0, 3)))]
    widths.append(8 * draw(st.integers(1, 20)))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    bands = tuple(
        Band(start, width, tuple(Stage(d) for d in draw(STAGES)))
        for start, width in zip(starts, widths, strict=True)
    )
    return VQLayout(draw(st.integers(1, 200)), sum(widths), bands, draw(st.booleans()))


def assert_same(left: VQWeight, right: VQWeight) -> None:
    assert left.layout == right.layout
    for name in ("codes", "codebooks", "codebook_scales"):
        for ours, theirs in zip(getattr(left, name), getattr(right, name), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
    assert torch.equal(left.scales, right.scales)
    assert (left.permutation is None) == (right.permutation is None)
    if left.permutation is not None:
        assert torch.equal(left.permutation, right.permutation)


@settings(max_examples=60, deadline=None)
@given(layout=drawn_layouts(), backend=st.sampled_from(layouts.BACKENDS))
def test_packing_round_trip_is_exact(layout: VQLayout, backend: str) -> None:
    weight = random_weight(layout)
    packed = pack(weight, backend)
    assert_same(unpack(packed), weight)
    assert packed.num_codes == sum(c.numel() for stages in weight.codes for c in stages)


def test_copies_of_a_packed_weight_own_their_memory() -> None:
    packed = pack(random_weight(VQLayout.uniform(70, 64, 2, has_permutation=True)), "cpu")
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(twin, PackedVQ)
        assert twin.address != packed.address
        assert twin.tensors["codes"].data_ptr() == int(twin.tensors["descriptor"][0])
        assert_same(unpack(twin), unpack(packed))


@pytest.mark.parametrize(("rate", "bits"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8)])
def test_a_rate_is_what_its_codes_cost(rate: int, bits: int) -> None:
    layout = VQLayout.uniform(64, 256, rate)
    assert layout.code_bits() == bits * layout.num_weights
    assert layout.codes_per_row == 32 * bits


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "vector_dim must be one of", lambda: Stage(3)),
        (NotImplementedError, "codec 'abacus'", lambda: Stage(8, "abacus")),
        (ValueError, "multiple of 8, got 12", lambda: Band(0, 12, (Stage(4),))),
        (ValueError, "no stage", lambda: Band(0, 32, ())),
        (ValueError, "rate must be one of", lambda: VQLayout.uniform(8, 64, 5)),
        (ValueError, "got 60", lambda: VQLayout.uniform(8, 60, 2)),
        (ValueError, "at least one band", lambda: VQLayout(8, 64, ())),
        (ValueError, "expected 0", lambda: VQLayout(8, 64, (Band(32, 32, (Stage(4),)),))),
        (ValueError, "cover 32", lambda: VQLayout(8, 64, (Band(0, 32, (Stage(4),)),))),
        (
            ValueError,
            "multiple of 32",
            lambda: VQLayout(8, 64, (Band(0, 40, (Stage(4),)), Band(40, 24, (Stage(4),)))),
        ),
        (
            ValueError,
            "multiple of 128",
            lambda: VQLayout(8, 1056, (Band(0, 32, (Stage(4),)), Band(32, 1024, (Stage(4),)))),
        ),
    ],
)
def test_wrong_layouts_are_refused(error: type[Exception], message: str, make: object) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_wrong_weights_are_refused_by_name() -> None:
    layout = VQLayout.uniform(8, 64, 2, has_permutation=True)
    good = random_weight(layout)
    parts = {
        name: getattr(good, name)
        for name in ("codes", "codebooks", "codebook_scales", "scales", "permutation")
    }
    wrong = [
        ("codes", ((good.codes[0][0][:, :8],),), ValueError, r"codes\[0\]\[0\] must have shape"),
        ("codes", ((good.codes[0][0].int(),),), TypeError, r"codes\[0\]\[0\] must be torch.uint8"),
        ("codes", (), ValueError, "codes holds"),
        ("codebooks", ((good.codebooks[0][0].float(),),), TypeError, "torch.int8"),
        ("scales", good.scales.float(), TypeError, "scales must be torch.float16"),
        ("permutation", None, ValueError, "permutation is missing"),
        ("permutation", torch.zeros(64, dtype=torch.int32), ValueError, "exactly once"),
    ]
    for name, value, error, message in wrong:
        with pytest.raises(error, match=message):
            VQWeight(layout, **{**parts, name: value})
    with pytest.raises(ValueError, match="backend must be one of"):
        pack(good, "abacus")
    with pytest.raises(ValueError, match="backend 'cpu'"):
        pack(good, "cpu", "meta")


def test_blocks_for_the_gpu_are_checked() -> None:
    packed = pack(random_weight(VQLayout.uniform(70, 64, 2)), "triton")
    for name, wrong, message in (
        ("codes", packed.tensors["codes"][:-1], "codes must be contiguous and hold 16384 numbers"),
        ("sources", packed.tensors["sources"].repeat(2)[::2], "sources must be contiguous"),
        ("codes", torch.cat([packed.tensors["codes"]] * 2)[1:16385], "multiple of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedVQ("triton", packed.layout, packed.device, {**packed.tensors, name: wrong})


@pytest.mark.parametrize("codec", ["lookup", "trellis"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_tensor_a_kernel_reads_is_checked(backend: str, codec: str) -> None:
    """Missing, too short or of another dtype: the name comes up before any launch."""
    layout = VQLayout.uniform(70, 64, 2, has_permutation=True, codec=codec)
    packed = pack(random_weight(layout), backend)
    for name, tensor in packed.tensors.items():
        if name == "descriptor":  # made anew from the others
            continue
        others = {key: value for key, value in packed.tensors.items() if key != name}
        for wrong in ({}, {name: tensor[:0]}):
            with pytest.raises(ValueError, match=f"^{name} must be contiguous and hold"):
                PackedVQ(backend, layout, packed.device, {**others, **wrong})
        with pytest.raises(TypeError, match=f"^{name} must be {tensor.dtype}, got torch.float64"):
            PackedVQ(backend, layout, packed.device, {**others, name: tensor.double()})
