"""Which blocks of the key/value pool belong to whom (called by `engine.scheduler`).

Numbers only, no tensors: a block is an index into `kv_cache.KVCache`. Block 0 is never given away;
it is the dummy that padding in a block table points at. Sharing blocks between requests with the
same beginning is not here.
"""

from __future__ import annotations

DUMMY_BLOCK = 0


class BlockManager:
    """A free list of block indices."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Own blocks 1 to `num_blocks - 1` of `block_size` tokens each."""
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"need at least two blocks of at least one token, got {num_blocks} of {block_size}"
            )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, DUMMY_BLOCK, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit when one request holds every block."""
        return (self.num_blocks - 1) * self.block_size

    def num_missing_blocks(self, block_table: list[int], num_tokens: int) -> int:
        """Return how many more blocks `block_table` needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def allocate(self, block_table: list[int], num_tokens: int) -> bool:
        """Extend `block_table` in place until it holds `num_tokens` tokens.

        Returns:
            False, with nothing changed, if there are not enough free blocks.
        """
        missing = self.num_missing_blocks(block_table, num_tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._is_used[block] = True
            block_table.append(block)
        return True

    def release(self, block_table: list[int]) -> None:
        """Take all blocks of `block_table` back and empty it.

        Raises:
            ValueError: if a block is not in use, so that no block is ever free twice.
        """
        while block_table:
            block = block_table[-1]
            if not self._is_used[block]:
                raise ValueError(f"block {block} is released, but it is not in use")
            self._is_used[block] = False
            self._free.append(block_table.pop())
