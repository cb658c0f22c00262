"""The trellis is judged by a reading of its definition bit by bit, in plain Python."""

from __future__ import annotations

import itertools

import pytest
import torch

from mgvq_kernels import ops, reference, trellis
from mgvq_kernels.layout import TRELLIS_RATES, Band, Stage, VQLayout, VQWeight, rate_stages
from mgvq_kernels.packing import pack, unpack
from tests.kernels.random_weights import oracle, random_weight, stream_windows

ROWS = (2, 3, 255, 256, 257, 511, 512, 700)


@pytest.mark.parametrize("rate", TRELLIS_RATES)
@pytest.mark.parametrize("out_features", ROWS)
def test_windows_are_the_last_bits_of_the_stream(out_features: int, rate: int) -> None:
    generator = torch.Generator().manual_seed(out_features * rate)
    shape = (out_features, 2 * rate)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    for window in (8, 9, 10, 11, 12):
        entries = trellis.windows(codes, rate, window)
        assert entries.tolist() == stream_windows(codes.tolist(), rate, window)
        assert torch.equal(trellis.pack_windows(entries, rate), codes)
        some = torch.tensor([out_features - 1, 0, 1, 0])
        assert torch.equal(trellis.row_windows(codes, some, rate, window), entries[some])


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        (2, {0: 1}),
        (511, {0: 510}),
        (512, {0: 255, 256: 511}),
        (700, {0: 255, 256: 699}),
        (768, {0: 255, 256: 511, 512: 767}),
    ],
)
def test_the_row_before_a_segment_is_its_last(rows: int, starts: dict[int, int]) -> None:
    expected = [starts.get(r, r - 1) for r in range(rows)]
    assert trellis.previous_rows(rows).tolist() == expected


MIXED = VQLayout(
    300,
    208,
    (
        Band(0, 32, rate_stages(1, "trellis")),
        Band(32, 64, rate_stages(2, "trellis", 10)),
        Band(96, 64, rate_stages(3, "trellis", 8)),
        Band(160, 32, rate_stages(5, "trellis")),
        Band(192, 16, rate_stages(4, "trellis", 11)),
    ),
    has_permutation=True,
)
LAYOUTS = {
    "mixed": MIXED,
    "two rows": VQLayout.uniform(2, 8, 1, codec="trellis"),
    "segments": VQLayout.uniform(530, 40, 2, has_permutation=True, codec="trellis"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_reference_is_the_definition(layout: VQLayout) -> None:
    weight = random_weight(layout)
    dense = torch.from_numpy(oracle(weight))
    found = reference.vq_dequantize(weight, torch.float64)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=0)
    ids = torch.tensor([0, layout.out_features - 1, 1, 1])
    rows = reference.vq_embedding(ids, weight, torch.float64)
    assert torch.equal(rows, found[ids])
    x = torch.randn(3, layout.in_features, dtype=torch.float64)
    bias = torch.randn(layout.out_features, dtype=torch.float64)
    torch.testing.assert_close(reference.vq_linear(x, weight, bias), x @ dense.T + bias)


def test_packing_for_the_reference_is_exact() -> None:
    weight = random_weight(MIXED)
    packed = pack(weight, "reference")
    back = unpack(packed)
    for name in ("codes", "codebooks", "codebook_scales"):
        pairs = zip(
            itertools.chain.from_iterable(getattr(back, name)),
            itertools.chain.from_iterable(getattr(weight, name)),
            strict=True,
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert torch.equal(ops.vq_dequantize(packed), reference.vq_dequantize(weight, torch.float32))


def test_a_trellis_costs_what_its_codes_and_table_hold() -> None:
    layout = VQLayout.uniform(64, 256, 3, codec="trellis", window=10)
    assert layout.code_bits() == 3 * layout.num_weights
    assert layout.codebook_bits() == 1024 * 8 + 32
    assert layout.code_shape(0, 0) == (64, 96)
    assert layout.codec == "trellis"
    assert layout.bands[0].rate == 3
    assert rate_stages(3) == (Stage(4), Stage(8))
    assert Stage(4) == Stage(4, "lookup", 2, 8)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("vector_dim must be 1", lambda: Stage(2, "trellis", 2, 12)),
        ("rate must be one of .* got 0", lambda: Stage(1, "trellis")),
        ("rate must be one of .* got 6", lambda: rate_stages(6, "trellis")),
        ("window must be one of .* got 13", lambda: rate_stages(2, "trellis", 13)),
        ("window must be one of .* got 7", lambda: rate_stages(2, "trellis", 7)),
        ("has rate 2 and window 8, got rate 3", lambda: Stage(4, rate=3)),
        ("has rate 2 and window 8, got rate 0 and window 12", lambda: Stage(4, window=12)),
        ("a trellis stands alone", lambda: Band(0, 32, rate_stages(2, "trellis") * 2)),
        ("needs 2 of them", lambda: VQLayout.uniform(1, 64, 2, codec="trellis")),
        (
            "coded in one way",
            lambda: VQLayout(
                8, 64, (Band(0, 32, rate_stages(2)), Band(32, 32, rate_stages(2, "trellis")))
            ),
        ),
    ],
)
def test_what_no_trellis_has_is_refused(message: str, make: object) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_table_of_another_window_is_refused() -> None:
    weight = random_weight(VQLayout.uniform(8, 64, 2, codec="trellis", window=12))
    other = VQLayout.uniform(8, 64, 2, codec="trellis", window=11)
    with pytest.raises(ValueError, match=r"codebooks\[0\]\[0\] must have shape \[2048, 1\]"):
        VQWeight(other, weight.codes, weight.codebooks, weight.codebook_scales, weight.scales)
