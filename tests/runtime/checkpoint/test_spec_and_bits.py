"""The spec's JSON in both directions, and bits counted in full, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels.layout import Band, Stage, VQLayout
from mgvq_runtime.checkpoint.bits import BitCount, count_bits, counted_bits_per_weight, group_of
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec, quantized_tensors
from mgvq_runtime.errors import CheckpointError

STAGES = st.lists(st.sampled_from([8, 4, 2, 1]), min_size=1, max_size=3)


@st.composite
def matrix_specs(draw: st.DrawFn) -> MatrixSpec:
    widths = draw(st.lists(st.integers(1, 4), max_size=3).map(lambda w: [32 * n for n in w]))
    widths.append(8 * draw(st.integers(1, 10)))
    bands, names, start = [], [], 0
    for width in widths:
        dims = draw(STAGES)
        bands.append(Band(start, width, tuple(Stage(d) for d in dims)))
        names.append(tuple(draw(st.sampled_from([None, f"shared-{d}"])) for d in dims))
        start += width
    rows = draw(st.integers(1, 2**40))
    return MatrixSpec(VQLayout(rows, start, tuple(bands), draw(st.booleans())), tuple(names))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("a b.c model.layers.3.x".split()), matrix_specs()))
def test_json_round_trip(matrices: dict[str, MatrixSpec]) -> None:
    spec = QuantizationSpec(matrices, {"target": 2.0}, {"a": [1, None]}, {}, "0.1.0", "x")
    assert QuantizationSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def minimal(**stage: Any) -> dict[str, Any]:
    matrix = {
        "shape": [4, 8],
        "permutation": False,
        "bands": [{"width": 8, "stages": [{"vector_dim": 4, "codec": "lookup", **stage}]}],
    }
    return QuantizationSpec({}).to_json() | {"matrices": {"x": matrix}}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"vector_dim": 3}, "vector_dim must be one of"),
        ({"vector_dim": "4"}, "must be a whole number"),
        ({"vector_dim": True}, "must be a whole number"),
        ({"codec": "e8p"}, "codec 'e8p' is not known"),
        ({"codebook": "a.b"}, "letters, digits, _ and - only"),
        ({"codebook": 1}, "must be strings"),
        ({"codebok": "a"}, "did you mean 'codebook'"),
    ],
)
def test_a_bad_stage_is_explained(edit: dict[str, Any], message: str) -> None:
    QuantizationSpec.from_json(minimal())
    with pytest.raises(CheckpointError, match=message):
        QuantizationSpec.from_json(minimal(**edit))


@pytest.mark.parametrize("name", ["", "a..b", "a/b", "codebooks.x", ".a", "a b", "x" * 201])
def test_names_that_are_no_modules(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not the name of a module"):
        QuantizationSpec({name: MatrixSpec(VQLayout.uniform(4, 8, 2))})


def test_a_shared_codebook_has_one_dimension() -> None:
    four = MatrixSpec(VQLayout.uniform(4, 8, 2), (("s",),))
    eight = MatrixSpec(VQLayout.uniform(4, 8, 1), (("s",),))
    with pytest.raises(CheckpointError, match="uses codebook 's' with vector_dim 8"):
        QuantizationSpec({"a": four, "b": eight})


def test_bits_by_hand() -> None:
    layout = VQLayout(
        64, 160, (Band(0, 128, (Stage(4),)), Band(128, 32, (Stage(4), Stage(8)))), True
    )
    matrices = {
        "model.layers.0.mlp.down_proj": MatrixSpec(layout, ((None,), ("s", None))),
        "visual.blocks.0.attn.qkv": MatrixSpec(VQLayout.uniform(10, 64, 2), (("s",),)),
        "visual.merger.mlp.0": MatrixSpec(VQLayout.uniform(10, 8, 8)),
        "lm_head": MatrixSpec(VQLayout.uniform(10, 16, 4)),
    }
    decoder = BitCount(
        weights=64 * 160,
        codes=64 * 8 * (128 // 4 + 32 // 4 + 32 // 8),
        codebooks=(256 * 4 * 8 + 32) * 2 + (256 * 8 * 8 + 32),
        scales=16 * 64,
        permutation=32 * 160,
    )
    counts = count_bits(matrices)
    assert counts["decoder"] == decoder
    assert counts["vision"] == BitCount(640, 2 * 640, 0, 160)  # its codebook is paid for above
    assert counts["projector"] == BitCount(80, 640, 256 * 8 + 32, 160)
    assert counts["embedding"] == BitCount(160, 640, 256 * 2 * 8 + 32, 160)
    assert list(counts)[-1] == "total"
    assert counts["total"].bits == sum(c.bits for g, c in counts.items() if g != "total")
    assert counted_bits_per_weight(matrices)["decoder"] == decoder.bits / 10240


def test_the_count_is_the_size_on_disk() -> None:
    """Every bit counted is a bit of some tensor, and the other way round."""
    itemsize = {"U8": 1, "I8": 1, "F16": 2, "F32": 4, "I32": 4}
    layout = VQLayout(12, 72, (Band(0, 64, (Stage(4),)), Band(64, 8, (Stage(2), Stage(8)))), True)
    matrices = {
        "a": MatrixSpec(layout, (("s",), (None, "t"))),
        "b": MatrixSpec(VQLayout.uniform(4, 40, 3), (("s", "t"),)),
    }
    size = 0
    for tensor in quantized_tensors(QuantizationSpec(matrices)).values():
        count = 1
        for extent in tensor.shape:
            count *= extent
        size += count * itemsize[tensor.dtype]
    assert count_bits(matrices)["total"].bits == 8 * size


def test_groups() -> None:
    names = ["model.layers.3.mlp.down_proj", "model.embed_tokens", "lm_head", "visual.merger.mlp.0"]
    names += ["visual.blocks.1.attn.qkv", "visual.patch_embed.proj", "mlp1.1"]
    groups = ["decoder", "embedding", "embedding", "projector", "vision", "vision", "other"]
    assert [group_of(name) for name in names] == groups
    assert count_bits({})["total"].bits_per_weight == 0.0
