"""What one forward is about, as one argument (built by the engine, read by `layers.attention`).

State is passed, never ambient: positions, lengths, block tables and caches all travel here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """The cached keys and values of one layer."""

    keys: Tensor
    """`[num_blocks, block_size, Hk, Dh]`, floating or int8."""
    values: Tensor
    """The same."""
    key_scales: Tensor | None = None
    """`[num_blocks, block_size, Hk]` float16 that int8 keys are multiplied by."""
    value_scales: Tensor | None = None
    """The same for values."""


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """The tokens of one forward, all sequences laid end to end.

    With `kv_cache` None the sequences attend to themselves alone, causally and differentiably
    (calibration, parity); otherwise keys and values go through the paged cache and the other
    optional fields are needed too.
    """

    positions: Tensor
    """`[3, T]` int64: time, height and width position of each token."""
    cu_seqlens_q: tuple[int, ...]
    """`R + 1` running sums of new tokens a request, from 0 to T."""
    context_lens: tuple[int, ...] | None = None
    """Tokens of each request in the cache once this forward has written its own."""
    block_table: Tensor | None = None
    """`[R, max_blocks]` int32: cache blocks of each request, in order."""
    slot_mapping: Tensor | None = None
    """`[T]` int64: block * block_size + offset where each token's key and value go."""
    kv_cache: Sequence[LayerCache] | None = None
    """One a layer."""
    context_lens_tensor: Tensor | None = None
    """`[R]` int32: `context_lens` on the device, instead of it, where every request has one
    new token and its length must not be read on the host (`engine.decode_graphs`)."""

    @classmethod
    def of_sequence(cls, positions: Tensor) -> ForwardBatch:
        """Return a batch of one whole sequence without a cache.

        Args:
            positions: `[3, T]` int64.
        """
        return cls(positions.to(torch.int64), (0, positions.shape[1]))

    @property
    def num_tokens(self) -> int:
        """T, the new tokens of all requests."""
        return self.cu_seqlens_q[-1]
