"""The registered custom ops: torch's own checks, and a compiled graph against the front door."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mgvq_kernels import ops, torch_ops
from mgvq_kernels.packing import pack
from tests.kernels.random_weights import MIXED, random_weight

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def cases() -> dict[str, tuple[Any, ...]]:
    """Arguments of every op, tensors cut from larger ones among them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 8, 16).split((4, 2, 2), dim=1)
    cos, sin = torch.rand(2, 3, 16)
    slots = torch.tensor([7, 0, 10])
    caches = [torch.zeros(3, 4, 2, 16, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(3, 4, 2).half() for _ in range(2)]
    plain = [cache.float() for cache in caches]
    table = torch.tensor([[0, 1], [2, 0], [1, 2]], dtype=torch.int32)
    lengths = torch.tensor([5, 1, 8], dtype=torch.int32)
    packed = torch_ops.flatten(pack(random_weight(MIXED), "reference"))
    x, weight = torch.randn(2, 3, 424), torch.rand(424)
    return {
        "vq_linear": (x, *packed, torch.rand(150), torch.randn(2, 3, 150), False),
        "vq_embedding": (torch.tensor([149, 0]), *packed, torch.float16),
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, x * 2, weight, 1e-6),
        "swiglu": (x,),
        "rope": (q, k, cos, sin),
        "write_kv": (k, v, *caches, slots, *scales),
        "rope_write_kv": (q, k, v, cos, sin, *plain, slots, None, None),
        "paged_attention_decode": (q.contiguous(), *plain, table, lengths, 0.25, None, None),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_ops_are_well_formed(name: str) -> None:
    """Schema, mutation and aliasing as declared; the fake has the shape and dtype that come."""
    op = getattr(torch.ops.mgvq, name).default
    torch.library.opcheck(op, cases()[name], test_utils=CHECKS)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_flattened_weight_comes_back(backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("numba", reason="the cpu order is read by numba kernels")
    weight = pack(random_weight(MIXED), backend)
    back = torch_ops.unflatten(*torch_ops.flatten(weight))
    assert (back.backend, back.layout, back.device) == (backend, MIXED, weight.device)
    x = torch.randn(2, 424)
    assert torch.equal(ops.vq_linear(x, back), ops.vq_linear(x, weight))


def test_a_captured_graph_computes_what_the_front_door_does() -> None:
    """One graph without breaks, whose caches change as they do outside it."""
    weight = pack(random_weight(MIXED), "reference")
    flat = torch_ops.flatten(weight)
    norm = torch.rand(424)

    def step(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        normed = torch.ops.mgvq.rms_norm(x, norm, 1e-6)
        y = torch.ops.mgvq.vq_linear(normed, *flat, None, None, False)
        heads = y[:, :32].reshape(-1, 2, 16)
        slots = torch.arange(x.shape[0])
        torch.ops.mgvq.write_kv(heads, heads, keys, values, slots, None, None)
        return torch.ops.mgvq.swiglu(y)

    x, caches = torch.randn(3, 424), [torch.zeros(2, 4, 2, 16) for _ in range(4)]
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    y = compiled(x, *caches[:2])
    product = ops.vq_linear(ops.rms_norm(x, norm, 1e-6), weight)
    assert torch.equal(y, ops.swiglu(product))
    heads = product[:, :32].reshape(-1, 2, 16)
    ops.write_kv(heads, heads, *caches[2:], torch.arange(3))
    assert torch.equal(caches[0], caches[2])
