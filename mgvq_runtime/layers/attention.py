"""Grouped-query attention of the decoder, through the paged cache or without one.

Used by `models.decoder`; the vision tower's attention is in `models.vision`. Everything a forward
depends on comes as an argument: rotary cosines, the `ForwardBatch`, this layer's cache.
"""

from __future__ import annotations

from torch import Tensor, nn

from mgvq_kernels import ops
from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.layers.linear import LayerFactory


class Attention(nn.Module):
    """Causal attention with `H` query heads over `Hk` key/value heads; q, k, v in one matrix."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        biases: tuple[bool, bool],
        factory: LayerFactory,
    ) -> None:
        """Make the layer that the checkpoint calls `name`.

        Args:
            name: Prefix of the matrices' names.
            hidden_size: D.
            num_heads: H.
            num_key_value_heads: Hk, a divisor of H.
            head_dim: Dh; H * Dh need not be D.
            biases: Whether q, k and v have a bias, and whether the output projection has one.
            factory: Makes each matrix dense or quantized.
        """
        super().__init__()
        D, H, Hk = hidden_size, num_heads, num_key_value_heads
        self.head_dim = head_dim
        self.num_qkv_heads = H + 2 * Hk
        self.split = (H, Hk, Hk)
        self.scale = self.head_dim**-0.5
        width = self.num_qkv_heads * head_dim
        self.qkv_proj = factory.linear(f"{name}.qkv_proj", D, width, bias=biases[0])
        self.o_proj = factory.linear(f"{name}.o_proj", H * head_dim, D, bias=biases[1])

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        kv_cache: LayerCache | None,
    ) -> Tensor:
        """Return `[T, D]`, the mixed values.

        Args:
            x: `[T, D]` normalised hidden states.
            cos: `[T, Dh]` float32.
            sin: `[T, Dh]` float32.
            batch: Lengths and cache addresses of the requests.
            kv_cache: This layer's caches, or None for attention over the batch alone.
        """
        T = x.shape[0]
        qkv = self.qkv_proj(x).view(T, self.num_qkv_heads, self.head_dim)  # [T, H + 2 Hk, Dh]
        q, k, v = qkv.split(self.split, dim=1)  # [T, H, Dh], [T, Hk, Dh] twice
        if kv_cache is None:
            q, k = ops.rope(q, k, cos, sin)
            mixed = ops.varlen_attention(q, k, v, batch.cu_seqlens_q, True, self.scale)
        else:
            mixed = self._through_cache((q, k, v), (cos, sin), batch, kv_cache)
        return self.o_proj(mixed.reshape(T, -1))  # [T, H * Dh]

    def _through_cache(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        rotation: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        cache: LayerCache,
    ) -> Tensor:
        """Write this forward's keys and values, then attend over each request's whole context."""
        keys, values, *scales = cache
        assert batch.slot_mapping is not None, "a batch with a cache needs a slot_mapping"
        assert batch.block_table is not None, "a batch with a cache needs a block_table"
        q = ops.rope_write_kv(*qkv, *rotation, keys, values, batch.slot_mapping, *scales)
        lengths = batch.context_lens_tensor
        if lengths is not None:
            return ops.paged_attention_decode(
                q, keys, values, batch.block_table, lengths, self.scale, *scales
            )
        assert batch.context_lens is not None, "a batch with a cache needs context_lens"
        return ops.paged_attention(
            q,
            keys,
            values,
            batch.block_table,
            batch.cu_seqlens_q,
            batch.context_lens,
            self.scale,
            *scales,
        )
