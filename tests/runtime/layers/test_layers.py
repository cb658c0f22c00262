"""Layers, dense and quantized: shapes, names, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mgvq_kernels.layout import Band, Stage, VQLayout, VQWeight
from mgvq_kernels.ops import vq_dequantize
from mgvq_runtime.layers.embedding import TiedHead, VQEmbedding
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.layers.linear import LayerFactory, VQLinear
from mgvq_runtime.layers.norm import RMSNorm
from mgvq_runtime.layers.rope import MRope, VisionRope, inverse_frequencies, patch_positions
from tests.runtime.layers.random_weight import random_weight

LAYOUT = VQLayout(
    48, 64, (Band(0, 32, (Stage(4), Stage(8))), Band(32, 32, (Stage(2),))), has_permutation=True
)


def test_factory_decides_by_name() -> None:
    factory = LayerFactory({"a.b": LAYOUT, "table": LAYOUT})
    assert isinstance(factory.linear("a.b", 64, 48), VQLinear)
    dense = factory.linear("a.c", 64, 48, bias=True)
    assert isinstance(dense, nn.Linear)
    assert not any(p.requires_grad for p in dense.parameters())
    assert isinstance(factory.embedding("table", 48, 64), VQEmbedding)
    assert isinstance(factory.embedding("a.b.c", 48, 64), nn.Embedding)
    assert isinstance(LayerFactory().linear("a.b", 64, 48), nn.Linear)


def test_factory_refuses_another_shape() -> None:
    factory = LayerFactory({"a": LAYOUT})
    with pytest.raises(ValueError, match=r"layout is \[48, 64\], the layer is \[48, 32\]"):
        factory.linear("a", 32, 48)
    with pytest.raises(ValueError, match=r"layout is \[48, 64\], the layer is \[64, 48\]"):
        factory.embedding("a", 64, 48)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_vq_linear_is_its_dequantized_self(rows: int) -> None:
    weight = random_weight(LAYOUT, seed=1)
    layer = VQLinear(64, 48, LAYOUT, bias=True)
    layer.load(weight)
    assert layer.bias is not None
    layer.bias.data = torch.randn(48)
    x = torch.randn(rows, 64)
    expected = nn.functional.linear(x, vq_dequantize(weight), layer.bias)
    # Few rows go through 16-bit partial sums: 1e-3 of the largest output is far above their error.
    assert (layer(x) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_vq_embedding_and_its_head() -> None:
    weight = random_weight(LAYOUT, seed=2)
    table = VQEmbedding(48, 64, LAYOUT)
    table.load(weight)
    dense = vq_dequantize(weight)
    ids = torch.tensor([0, 47, 5, 5])
    assert torch.allclose(table(ids), dense[ids], atol=1e-6)
    table.dtype = torch.float16
    assert table(ids).dtype == torch.float16
    head = TiedHead(table)
    hidden = torch.randn(2, 64)
    expected = hidden @ dense.T
    assert (head(hidden) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert not list(head.state_dict())


def test_dense_tied_head_follows_its_table() -> None:
    table = nn.Embedding(10, 4)
    head = TiedHead(table)
    table.weight = nn.Parameter(torch.randn(10, 4))
    hidden = torch.randn(3, 4)
    assert torch.equal(head(hidden), hidden @ table.weight.T)


@pytest.mark.parametrize("kind", [VQLinear, VQEmbedding])
def test_load_refuses_another_layout(kind: type) -> None:
    layer = VQLinear(64, 48, LAYOUT) if kind is VQLinear else VQEmbedding(48, 64, LAYOUT)
    other: VQWeight = random_weight(VQLayout.uniform(48, 64, 4), seed=0)
    with pytest.raises(ValueError, match="the weight's layout .* is not the"):
        layer.load(other)


def test_norm_adds_first() -> None:
    norm = RMSNorm(8, 1e-6)
    norm.weight.data = torch.randn(8)
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    normed, total = norm.add(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.allclose(normed, norm(total))
    rms = total.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    assert torch.allclose(normed, total / rms * norm.weight, atol=1e-6)


def test_mrope_sections() -> None:
    """Each pair turns with its own axis, and both halves of a head alike."""
    rope = MRope(inverse_frequencies(16, 10000.0), (2, 3, 3))
    positions = torch.tensor([[5, 0], [0, 7], [0, 0]])
    cos, sin = rope(positions)
    assert cos.shape == sin.shape == (2, 16)
    assert cos.dtype == torch.float32
    assert torch.equal(sin[:, :8], sin[:, 8:])
    assert (sin[0, :2] != 0).all()
    assert (sin[0, 2:8] == 0).all()
    assert (sin[1, :2] == 0).all()
    assert (sin[1, 2:5] != 0).all()
    assert torch.allclose(cos**2 + sin**2, torch.ones(2, 16))


def test_ropes_exist_under_a_meta_device() -> None:
    with torch.device("meta"):
        ropes = MRope(inverse_frequencies(16, 10000.0), (2, 3, 3)), VisionRope(16, 10000.0, 2)
    assert all(b.device.type == "cpu" for rope in ropes for b in rope.buffers())
    assert not any(rope.state_dict() for rope in ropes)


def test_patches_come_in_blocks() -> None:
    positions = patch_positions((2, 2, 4), 2, torch.device("cpu"))
    frame = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert positions.tolist() == frame * 2


def test_forward_batch_of_one_sequence() -> None:
    batch = ForwardBatch.of_sequence(torch.arange(5).expand(3, 5))
    assert (batch.num_tokens, batch.cu_seqlens_q, batch.kv_cache) == (5, (0, 5), None)
