"""vq_dequantize, vq_linear and vq_embedding against a decoder in plain Python and float64."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgvq_kernels import cpu, cpu_jit, cpu_lookup, dispatch, ops, reference
from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_kernels.packing import pack
from tests.kernels.random_weights import MIXED, oracle, random_weight

REFERENCE_ERROR = 1e-6
MOST_ROWS = dispatch.LOOKUP_ROWS if cpu.HAS_BYTE_PERMUTE else dispatch.GATHER_ROWS
"""Rows of x that are looked up on this processor; more are multiplied by a decoded matrix."""
LOOKUP_ERROR = 2e-4
"""16-bit partial sums: measured 3e-5 to 6e-5 on random data."""
DTYPE_ERROR = {torch.float32: LOOKUP_ERROR, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_lookup_close(y: torch.Tensor, x: torch.Tensor, weight: VQWeight) -> None:
    """Within the worst case of 16-bit partial sums: half a step for each code."""
    truth = reference.vq_linear(x.double(), weight, None)
    entry = sum(
        float(book.abs().max()) * float(scale)
        for books, scales in zip(weight.codebooks, weight.codebook_scales, strict=True)
        for book, scale in zip(books, scales, strict=True)
    )
    worst = x.shape[1] * float(x.abs().max()) * entry * float(weight.scales.max()) / 65000
    assert float((y - truth).abs().max()) <= worst


def relative_error(y: torch.Tensor, truth: np.ndarray) -> float:
    return float(np.linalg.norm(y.double().numpy() - truth) / np.linalg.norm(truth))


@pytest.fixture(scope="module")
def mixed() -> tuple[VQWeight, np.ndarray]:
    weight = random_weight(MIXED)
    return weight, oracle(weight)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_dequantize_is_the_format(backend: str, mixed: tuple[VQWeight, np.ndarray]) -> None:
    """All orders decode to the same bits, and those are the format's definition."""
    weight, truth = mixed
    dense = ops.vq_dequantize(pack(weight, backend))
    assert torch.equal(dense, ops.vq_dequantize(weight))
    np.testing.assert_allclose(dense.double().numpy(), truth, rtol=1e-5, atol=1e-4)
    half = ops.vq_dequantize(pack(weight, backend), torch.float16)
    assert torch.equal(half, ops.vq_dequantize(weight).half())


@pytest.mark.parametrize("dtype", list(DTYPE_ERROR))
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 33, 65])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_linear(
    backend: str, rows: int, dtype: torch.dtype, mixed: tuple[VQWeight, np.ndarray]
) -> None:
    weight, truth = mixed
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 424, generator=generator).to(dtype)
    bias = torch.randn(150, generator=generator).to(dtype)
    y = ops.vq_linear(x, pack(weight, backend), bias)
    assert y.dtype == dtype
    assert y.shape == (rows, 150)
    expected = x.double().numpy() @ truth.T + bias.double().numpy()
    if rows:
        assert relative_error(y, expected) < DTYPE_ERROR[dtype]


def test_reference_computes_float64_in_float64(mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight, truth = mixed
    x = torch.randn(3, 424, dtype=torch.float64)
    y = ops.vq_linear(x, pack(weight, "reference"))
    assert relative_error(y, x.numpy() @ truth.T) < 1e-12
    exact = ops.vq_linear(x.float(), pack(weight, "reference"))
    assert relative_error(exact, x.float().double().numpy() @ truth.T) < REFERENCE_ERROR


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(1, 330),
    groups=st.integers(1, 40),
    rate=st.sampled_from([1, 2, 3, 4, 8]),
    permuted=st.booleans(),
    rows=st.integers(1, 3),
)
def test_lookup_over_shapes(
    out_features: int, groups: int, rate: int, permuted: bool, rows: int
) -> None:
    weight = random_weight(VQLayout.uniform(out_features, 8 * groups, rate, permuted), out_features)
    x = torch.randn(rows, 8 * groups, generator=torch.Generator().manual_seed(groups))
    assert_lookup_close(ops.vq_linear(x, pack(weight, "cpu")), x, weight)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("codes", ["zero", "last", "same", "arange"])
def test_adversarial_codes(codes: str, rate: int) -> None:
    weight = random_weight(VQLayout.uniform(130, 288, rate, has_permutation=True), rate)
    for stage in weight.codes[0]:
        stage.copy_(torch.arange(stage.numel()).view_as(stage) % 256)
        if codes != "arange":
            stage.fill_({"zero": 0, "last": 255, "same": 77}[codes])
    x = torch.randn(2, 288)
    assert_lookup_close(ops.vq_linear(x, pack(weight, "cpu")), x, weight)


def test_one_hot_rows_recover_columns(mixed: tuple[VQWeight, np.ndarray]) -> None:
    """The best test of indexing: every input channel, alone, gives its own column."""
    weight, truth = mixed
    packed = pack(weight, "cpu")
    for first in range(0, 424, MOST_ROWS):
        x = torch.eye(424)[first : first + MOST_ROWS]
        columns = truth[:, first : first + MOST_ROWS].T
        y = ops.vq_linear(x, packed).double().numpy()
        assert np.abs(y - columns).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize(
    "fill", [0.0, 6e4, -6e4, 1e-7, 1e-38, 1e30], ids=["0", "6e4", "-6e4", "1e-7", "1e-38", "1e30"]
)
def test_extreme_activations(fill: float, mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight, truth = mixed
    x = torch.full((1, 424), fill)
    y = ops.vq_linear(x, pack(weight, "cpu")).double().numpy()
    expected = x.double().numpy() @ truth.T
    assert np.abs(y - expected).max() <= 1e-3 * np.abs(expected).max()


def test_alternating_signs_cancel(mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight, truth = mixed
    x = torch.ones(1, 424)
    x[:, 1::2] = -1.0
    y = ops.vq_linear(x, pack(weight, "cpu"))
    assert relative_error(y, x.double().numpy() @ truth.T) < LOOKUP_ERROR


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(poison: float, mixed: tuple[VQWeight, np.ndarray]) -> None:
    """A NaN or infinite channel spoils its own token as in torch, and no other token."""
    weight, truth = mixed
    x = torch.randn(3, 424)
    clean = ops.vq_linear(x, pack(weight, "cpu"))
    x[1, 200] = poison
    y = ops.vq_linear(x, pack(weight, "cpu"))
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    expected = x[1] @ torch.from_numpy(truth).float().T
    assert not expected.isfinite().any()
    assert not y[1].isfinite().any()
    if poison != poison:
        assert y[1].isnan().all()


def test_repeats_and_batches_are_bitwise_equal(mixed: tuple[VQWeight, np.ndarray]) -> None:
    """20 repeats agree, and a row's result does not depend on the rows beside it."""
    packed = pack(mixed[0], "cpu")
    x = torch.randn(MOST_ROWS, 424)
    first = ops.vq_linear(x, packed)
    assert all(torch.equal(ops.vq_linear(x, packed), first) for _ in range(20))
    for i in range(x.shape[0]):
        assert torch.equal(ops.vq_linear(x[i : i + 1], packed)[0], first[i])


def test_eight_rows_at_a_time_are_exact_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this processor would permute bytes; more strips than one table serves."""
    monkeypatch.setattr(cpu, "HAS_BYTE_PERMUTE", False)
    weight = random_weight(VQLayout.uniform(4166, 32, 3, has_permutation=True))
    packed, x, bias = pack(weight, "cpu"), torch.randn(11, 32), torch.randn(4166)
    y = cpu.lookup_linear(x, packed, bias)
    expected = x.double().numpy() @ oracle(weight).T + bias.double().numpy()
    assert relative_error(y, expected) < REFERENCE_ERROR
    for i in range(11):
        pair = x[[i, 0]]  # two rows take the same way in other lanes
        assert torch.equal(cpu.lookup_linear(pair, packed, bias)[0], y[i])


def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(VQLayout.uniform(1000, 96, 2, has_permutation=True))
    packed = pack(weight, "cpu")
    x = torch.randn(3, 96)
    alone = (cpu.lookup_linear(x, packed, None), cpu.decode_linear(x, packed, None))
    monkeypatch.setattr(cpu, "THREAD_CODES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(cpu.lookup_linear(x, packed, None), alone[0])
    assert torch.equal(cpu.decode_linear(x, packed, None), alone[1])


def test_decoding_in_chunks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(VQLayout.uniform(700, 96, 3, has_permutation=True))
    packed, x, bias = pack(weight, "cpu"), torch.randn(50, 96), torch.randn(700)
    monkeypatch.setattr(cpu, "CHUNK_FLOATS", 1)
    expected = reference.vq_linear(x.double(), weight, bias.double()).numpy()
    assert relative_error(ops.vq_linear(x, packed, bias), expected) < REFERENCE_ERROR


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_embedding(backend: str, mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight, _ = mixed
    ids = torch.tensor([149, 0, 63, 64, 0])
    dense = ops.vq_dequantize(weight)
    for dtype in (torch.float32, torch.bfloat16):
        rows = ops.vq_embedding(ids, pack(weight, backend), dtype)
        assert torch.equal(rows, dense[ids].to(dtype))
    assert ops.vq_embedding(ids[:0], pack(weight, backend)).shape == (0, 424)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_reach_activations(backend: str, mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight, truth = mixed
    x = torch.randn(2, 424, requires_grad=True)
    bias = torch.zeros(150, requires_grad=True)
    ops.vq_linear(x, pack(weight, backend), bias).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    assert relative_error(x.grad, np.repeat(truth.sum(0)[None], 2, axis=0)) < 1e-5
    assert torch.equal(bias.grad, torch.full((150,), 2.0))


@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_reach_bias_and_residual_without_activations(
    backend: str, rows: int, mixed: tuple[VQWeight, np.ndarray]
) -> None:
    packed, x = pack(mixed[0], backend), torch.randn(rows, 424)
    bias = torch.zeros(150, requires_grad=True)
    ops.vq_linear(x, packed, bias).sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((150,), float(rows)))
    residual = torch.zeros(rows, 150, requires_grad=True)
    ops.vq_linear(x, packed, residual=residual).sum().backward()
    assert residual.grad is not None
    assert torch.equal(residual.grad, torch.ones(rows, 150))


def test_odd_strides_and_leading_dimensions(mixed: tuple[VQWeight, np.ndarray]) -> None:
    packed = pack(mixed[0], "cpu")
    wide = torch.randn(2, 3, 848)
    x = wide[..., ::2]
    assert torch.equal(ops.vq_linear(x, packed), ops.vq_linear(x.contiguous(), packed))
    assert ops.vq_linear(x[0, 0], packed).shape == (150,)


def test_memory_is_about_the_codes() -> None:
    """2 bits a weight, and the tables do not eat what the codes save."""
    packed = pack(random_weight(VQLayout.uniform(1536, 1536, 2)), "cpu")
    assert packed.nbytes < 1.1 * packed.layout.num_weights / 4


def test_wrong_arguments_are_named(mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight, _ = mixed
    packed, x = pack(weight, "cpu"), torch.zeros(1, 424)
    with pytest.raises(TypeError, match="weight must be a PackedVQ, got VQWeight"):
        ops.vq_linear(x, weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[..., 424\], got \[1, 423\]"):
        ops.vq_linear(x[:, 1:], packed)
    with pytest.raises(TypeError, match=r"x must be one of .* got torch.int64"):
        ops.vq_linear(x.long(), packed)
    with pytest.raises(ValueError, match="x is on meta"):
        ops.vq_linear(x.to("meta"), packed)
    with pytest.raises(ValueError, match=r"bias must be \[150\], got \[149\]"):
        ops.vq_linear(x, packed, torch.zeros(149))
    with pytest.raises(TypeError, match="ids must be int64"):
        ops.vq_embedding(torch.zeros(1, dtype=torch.int32), packed)
    with pytest.raises(ValueError, match=r"ids must be \[T\]"):
        ops.vq_embedding(torch.zeros(1, 1, dtype=torch.int64), packed)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 150\), got -1..150"):
        ops.vq_embedding(torch.tensor([-1, 150]), packed)
    with pytest.raises(TypeError, match="dtype must be one of"):
        ops.vq_dequantize(packed, torch.int8)


def test_without_numba_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, mixed: tuple[VQWeight, np.ndarray]
) -> None:
    monkeypatch.setattr(ops, "has_numba", lambda: False)
    packed = ops.pack_for(mixed[0], "cpu")
    assert packed.backend == "reference"
    x = torch.randn(1, 424)
    assert (
        relative_error(ops.vq_linear(x, packed), x.double().numpy() @ mixed[1].T) < REFERENCE_ERROR
    )


def test_numba_is_the_default_on_a_cpu(mixed: tuple[VQWeight, np.ndarray]) -> None:
    ops.warm_up("cpu")
    assert ops.pack_for(mixed[0], "cpu").backend == "cpu"


@pytest.mark.skipif(not cpu_lookup.HAS_VBMI, reason="this processor gathers anyway")
def test_processors_without_byte_permutation_gather(tmp_path: Path) -> None:
    """Compiled for an older processor, the same calls give float32 results."""
    program = (
        "import torch\n"
        "from mgvq_kernels import cpu_lookup, ops, reference\n"
        "from mgvq_kernels.packing import pack\n"
        "from tests.kernels.random_weights import MIXED, random_weight\n"
        "assert not cpu_lookup.HAS_VBMI\n"
        "weight = random_weight(MIXED)\n"
        "x = torch.randn(3, 424)\n"
        "truth = reference.vq_linear(x.double(), weight, None)\n"
        "error = (ops.vq_linear(x, pack(weight, 'cpu')) - truth).norm() / truth.norm()\n"
        "assert error < 1e-6, error\n"
    )
    environment = os.environ | {
        "NUMBA_CPU_NAME": "nehalem",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


def test_a_kernel_is_compiled_anew_when_only_another_file_has_changed(tmp_path: Path) -> None:
    """Beside copies of the real files; numba keeps what it compiled with a function's own file."""
    for name in ("cpu_jit.py", "layout.py", "trellis.py"):
        shutil.copy(Path(cpu_jit.__file__).with_name(name), tmp_path)
    (tmp_path / "cpu_kernel.py").write_text(
        "from cpu_jit import compile_cached\n"
        "from cpu_sizes import SIZE\n"
        "@compile_cached\n"
        "def size():\n    return SIZE\n"
    )
    command = [sys.executable, "-B", "-c", "import cpu_kernel; print(cpu_kernel.size())"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    for size in ("2", "3"):
        (tmp_path / "cpu_sizes.py").write_text(f"SIZE = {size}\n")
        run = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60
        )
        assert run.stdout.split() == [size]
        assert list(tmp_path.rglob("cpu_kernel.size*.nbi")), "nothing was kept"


def test_layouts_without_permutation(mixed: tuple[VQWeight, np.ndarray]) -> None:
    weight = random_weight(dataclasses.replace(MIXED, has_permutation=False))
    x = torch.randn(2, 424)
    y = ops.vq_linear(x, pack(weight, "cpu"))
    assert relative_error(y, x.double().numpy() @ oracle(weight).T) < LOOKUP_ERROR


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_residual_and_gate_are_the_ops_written_out(backend: str) -> None:
    weight = random_weight(MIXED)
    packed = pack(weight, backend)
    x, bias, residual = torch.randn(3, 2 * 424), torch.randn(150), torch.randn(3, 150)
    y = ops.vq_linear(x, packed, bias, residual, gated=True)
    gate, up = x.double().chunk(2, -1)
    product = gate / (1 + (-gate).exp()) * up
    truth = product @ torch.from_numpy(oracle(weight)).T + bias + residual
    assert float((y - truth).norm() / truth.norm()) < 1e-3
    with pytest.raises(ValueError, match=r"x must be \[..., 848\], got \[3, 424\]"):
        ops.vq_linear(x[:, :424], packed, gated=True)
    with pytest.raises(ValueError, match=r"residual must be \[3, 150\], got \[2, 150\]"):
        ops.vq_linear(x, packed, bias, residual[:2], gated=True)
    with pytest.raises(TypeError, match="residual must be torch.float32"):
        ops.vq_linear(x, packed, bias, residual.half(), gated=True)
