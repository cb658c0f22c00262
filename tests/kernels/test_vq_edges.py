"""vq ops at the edges: drawn shapes, unlucky codes and numbers, poisoned and guarded memory.

The compiled CPU kernels; `interpreted/check_edges.py` draws the same for the GPU's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mgvq_kernels
from mgvq_kernels import cpu_decode, cpu_lookup, ops
from mgvq_kernels.layout import Band, PackedVQ, Stage, VQWeight
from mgvq_kernels.packing import pack
from tests.kernels import edge_cases
from tests.kernels.random_weights import MIXED, oracle, random_weight

STEPS = 32500 if cpu_lookup.HAS_VBMI else 0
"""Steps of a partial sum where bytes can be permuted; floats elsewhere."""

TRITON = Path(mgvq_kernels.__file__).parent / "triton"


@pytest.fixture(autouse=True, scope="module")
def _fresh_memory_is_nan() -> Iterator[None]:
    """Torch fills what it allocates with NaN here, so that no output is right by chance."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_the_fast_oracle_is_the_format() -> None:
    weight = random_weight(MIXED)
    np.testing.assert_allclose(edge_cases.decoded(weight), oracle(weight), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    weight=edge_cases.weights,
    tokens=st.sampled_from(edge_cases.TOKENS),
    kind=st.sampled_from(edge_cases.X),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_products(weight: VQWeight, tokens: int, kind: str, dtype: torch.dtype) -> None:
    x = edge_cases.edge_x(tokens, weight.layout.in_features, kind).to(dtype)
    packed = pack(weight, "cpu")
    y = ops.vq_linear(x, packed)
    edge_cases.assert_product(y, x, weight, steps=STEPS)
    assert torch.equal(ops.vq_linear(x, packed), y)


@settings(max_examples=12, deadline=None)
@given(weight=edge_cases.weights, backend=st.sampled_from(["cpu", "triton"]))
def test_decoding(weight: VQWeight, backend: str) -> None:
    """All orders decode to the reference's bits, rows included, and those are the format's."""
    dense = ops.vq_dequantize(weight)
    np.testing.assert_allclose(dense, edge_cases.decoded(weight), rtol=1e-6, atol=1e-4)
    packed = pack(weight, backend)
    assert torch.equal(ops.vq_dequantize(packed), dense)
    ids = torch.arange(weight.layout.out_features).flip(0)
    assert torch.equal(ops.vq_embedding(ids, packed), dense.flip(0))


@pytest.mark.parametrize("kind", edge_cases.KINDS)
def test_one_hot_rows_of_a_decoded_matrix_are_its_columns(kind: str) -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(257, 384, kind), "random")
    columns = ops.vq_linear(torch.eye(384), pack(weight, "cpu"))
    assert torch.equal(columns, ops.vq_dequantize(weight).t())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_stays_in_its_row_among_many(poison: float) -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(257, 256, "interleaved"), "random")
    packed, x = pack(weight, "cpu"), torch.randn(65, 256)
    clean = ops.vq_linear(x, packed)
    x[31, 200] = poison
    y = ops.vq_linear(x, packed)
    kept = torch.arange(65) != 31
    assert torch.equal(y[kept], clean[kept])
    assert not y[31].isfinite().any()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_nothing_around_the_weight_is_read_or_written(backend: str, tokens: int) -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(17, 256, "interleaved"), "random")
    packed = pack(weight, backend)
    guarded, guards = edge_cases.between_guards(packed)
    x, ids = torch.randn(tokens, 256), torch.tensor([16, 0])
    assert torch.equal(ops.vq_linear(x, guarded), ops.vq_linear(x, packed))
    assert torch.equal(ops.vq_dequantize(guarded), ops.vq_dequantize(packed))
    assert torch.equal(ops.vq_embedding(ids, guarded), ops.vq_embedding(ids, packed))
    assert all(bool((guard == 255).all()) for guard in guards)


@pytest.mark.parametrize("out_features", [1, 63, 65])
def test_nothing_around_the_output_is_written(out_features: int) -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(out_features, 128, "2 bits"), "random")
    packed, x, ids = pack(weight, "cpu"), torch.randn(2, 128), torch.tensor([out_features - 1])
    for rows, width, run in (
        (2, out_features, lambda at: cpu_lookup.lookup(x.data_ptr(), at, 0, 2, packed.address, 0,
                                                       packed.strips)),
        (out_features, 128, lambda at: cpu_decode.decode(at, packed.address, 0, packed.strips)),
        (1, 128, lambda at: cpu_decode.take_rows(ids.data_ptr(), 1, at, packed.address)),
    ):  # fmt: skip
        room = torch.full((rows * width + 64,), float("nan"))
        run(room.data_ptr() + 4 * 32)
        assert room[32:-32].isfinite().all()
        assert room[:32].isnan().all()
        assert room[-32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_views_at_odd_offsets(tokens: int, dtype: torch.dtype) -> None:
    weight = edge_cases.edge_weight(edge_cases.edge_layout(17, 128, "2 bits"), "random")
    packed, flat = pack(weight, "cpu"), torch.randn(tokens * 128 + 1).to(dtype)
    bias = torch.randn(18).to(dtype)
    x = flat[1:].view(tokens, 128)
    y = ops.vq_linear(x, packed, bias[1:])
    assert torch.equal(y, ops.vq_linear(x.clone(), packed, bias[1:].clone()))
    ids = torch.arange(17)[1::2]
    assert torch.equal(ops.vq_embedding(ids, packed), ops.vq_embedding(ids.clone(), packed))


def test_tensors_of_the_wrong_size_are_named() -> None:
    """The kernels read addresses: what is too short must never reach them."""
    packed = pack(random_weight(MIXED), "cpu")
    for name in ("codes", "tables", "row_scales", "permutation", "tiles"):
        for wrong in (packed.tensors[name][:-1], packed.tensors[name].repeat_interleave(2, 0)[::2]):
            with pytest.raises(ValueError, match=f"{name} must be contiguous and hold"):
                PackedVQ("cpu", MIXED, packed.device, {**packed.tensors, name: wrong})


def test_a_band_needs_channels() -> None:
    with pytest.raises(ValueError, match="positive multiple of 8, got 0"):
        Band(0, 0, (Stage(4),))


def calls(tree: ast.AST, pattern: str) -> list[ast.Call]:
    """List the calls of `tl.<pattern>...` in a piece of source."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(f"tl.{pattern}")
    ]


@pytest.mark.parametrize("path", sorted(TRITON.glob("*.py")), ids=lambda path: path.stem)
def test_kernels_keep_off_the_traps(path: Path) -> None:
    """Atomics only count programs; gathers are flat, so that they go through shared memory.

    A float added atomically makes sums depend on who came first. A gather of rank 2 is forced into
    one warp: 8 shuffles and 7 selects a code of 256 entries.
    """
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in calls(function, "atomic"):
            assert ast.unparse(call.func) == "tl.atomic_add"
            assert ast.unparse(call.args[0]).startswith("counter"), ast.unparse(call)
        flat = {
            ast.unparse(node.targets[0])
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == "tl.reshape"
            and isinstance(node.value.args[1], ast.Tuple)
            and len(node.value.args[1].elts) == 1
        }
        for call in calls(function, "gather"):
            assert ast.unparse(call.args[0]) in flat, f"{path.name}: gather from a flat table"
