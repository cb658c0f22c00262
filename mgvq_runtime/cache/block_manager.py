"""Which blocks of the key/value pool belong to whom (called by `engine.scheduler`).

Numbers only, no tensors: a block is an index into `kv_cache.KVCache`. Block 0 is never given away;
it is the dummy that padding in a block table points at. A full block whose key is registered can be
found by other requests with the same beginning, also after its last user left, until its place is
needed: the free list is the cache, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from mgvq_runtime.cache.block_key import BlockKey

DUMMY_BLOCK = 0


class BlockManager:
    """Blocks with their users, and the keys that full ones are found by."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Own blocks 1 to `num_blocks - 1` of `block_size` tokens each."""
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"need at least two blocks of at least one token, got {num_blocks} of {block_size}"
            )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = OrderedDict.fromkeys(range(DUMMY_BLOCK + 1, num_blocks))
        self._num_users = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds, those that can still be found included."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that can be found, held or free."""
        return len(self._key_of)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit when one request holds every block."""
        return (self.num_blocks - 1) * self.block_size

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """Return the blocks of the longest beginning of `keys` that is there; nothing changes."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key.digest)
            if block is None or self._key_of[block].token_ids != key.token_ids:
                break
            blocks.append(block)
        return blocks

    def has_room(self, cached: Sequence[int], num_tokens: int, num_spare: int) -> bool:
        """Say whether a request that shares `cached` gets the rest of its `num_tokens` tokens.

        Args:
            cached: From `find`; those that nobody holds are taken from the free ones too.
            num_tokens: Tokens it must hold.
            num_spare: Blocks that must stay free besides.
        """
        num_taken = sum(not self._num_users[block] for block in cached)
        num_taken += self._num_missing_blocks(cached, num_tokens)
        return num_taken + num_spare <= len(self._free)

    def share(self, block_table: list[int], cached: Iterable[int]) -> None:
        """Append blocks that `find` returned to `block_table`; they are written no more."""
        for block in cached:
            self._free.pop(block, None)
            self._num_users[block] += 1
            block_table.append(block)

    def allocate(self, block_table: list[int], num_tokens: int) -> bool:
        """Extend `block_table` in place until it holds `num_tokens` tokens.

        Returns:
            False, with nothing changed, if there are not enough free blocks.
        """
        missing = self._num_missing_blocks(block_table, num_tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_users[block] = 1
            block_table.append(block)
        return True

    def register(self, block: int, key: BlockKey) -> None:
        """Let a block that is full from now on be found; of two with one key, the first is."""
        if key.digest not in self._block_of:
            self._key_of[block] = key
            self._block_of[key.digest] = block

    def release(self, block_table: list[int], num_tokens: int = 0) -> None:
        """Take the blocks of `block_table` back that lie beyond its first `num_tokens` tokens.

        Full ones can still be found. The last block is the first to be used again: a beginning is
        of use without its end.

        Raises:
            ValueError: if a block is not in use, so that no block is ever free twice.
        """
        while len(block_table) > -(-num_tokens // self.block_size):
            block = block_table[-1]
            if not self._num_users[block]:
                raise ValueError(f"block {block} is released, but it is not in use")
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
            block_table.pop()

    def forget(self, block_table: Iterable[int]) -> None:
        """Let nobody find these blocks any more: their values are not to be trusted."""
        for block in block_table:
            self._forget(block)

    def _num_missing_blocks(self, block_table: Sequence[int], num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key.digest]
