"""The pool of keys and values, allocated once (owned by `engine.model_runner`).

Which block belongs to whom is `block_manager`'s business; reading and writing the blocks is done by
`mgvq_kernels.ops.write_kv` and `paged_attention`.
"""

from __future__ import annotations

import torch

from mgvq_runtime.config import ModelFacts


class KVCache:
    """Keys and values of every layer, in blocks."""

    def __init__(
        self,
        facts: ModelFacts,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate the pool, all zeros: padding must never hold a NaN."""
        self._pool = torch.zeros(
            facts.num_hidden_layers,
            2,
            num_blocks,
            block_size,
            facts.num_key_value_heads,
            facts.head_dim,
            dtype=dtype,
            device=device,
        )  # [layers, 2, num_blocks, block_size, Hk, Dh]
        self.layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = tuple(
            (layer[0], layer[1]) for layer in self._pool
        )
        """Per layer the key and the value blocks, each `[num_blocks, block_size, Hk, Dh]`."""

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self._pool.numel() * self._pool.element_size()
