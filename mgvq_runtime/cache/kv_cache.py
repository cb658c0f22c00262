"""The pool of keys and values, allocated once (owned by `engine.model_runner`).

Which block belongs to whom is `block_manager`'s business; reading and writing the blocks is done by
`mgvq_kernels.ops.write_kv` and `paged_attention`.
"""

from __future__ import annotations

import torch

from mgvq_runtime.config import ModelFacts
from mgvq_runtime.layers.forward_batch import LayerCache


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
        """Allocate the pool, all zeros: padding must never hold a NaN.

        Args:
            facts: Shapes of the model.
            num_blocks: Blocks, the reserved block 0 included.
            block_size: Tokens of a block.
            device: Where the pool lies.
            dtype: A floating type, or int8, which has a float16 scale a token and head.
        """
        shape = (facts.num_hidden_layers, 2, num_blocks, block_size, facts.num_key_value_heads)
        pool = torch.zeros(*shape, facts.head_dim, dtype=dtype, device=device)
        self._tensors = [pool]  # [layers, 2, num_blocks, block_size, Hk, Dh]
        if dtype is torch.int8:
            self._tensors.append(torch.zeros(shape, dtype=torch.float16, device=device))
        self.layers: tuple[LayerCache, ...] = tuple(
            LayerCache(*(half for tensor in self._tensors for half in tensor[layer]))
            for layer in range(facts.num_hidden_layers)
        )
        """One a layer, views of the pool."""

    @property
    def num_bytes(self) -> int:
        """Size of the pool, scales included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
