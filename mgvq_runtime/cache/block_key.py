"""What makes two blocks of keys and values the same (called by `engine.sequence`).

A key is a digest chained over blocks: whatever the values of a block depend on is in it, so equal
keys mean equal values, and a picture that differs in one pixel, another position or another tenant
never shares. Digests are of 256 bits and never shortened: a collision would show one user's picture
to another. No torch, no tensors.

Source: the chained hash of nano-vllm's block manager; the picture's digest and offset beside the
tokens as in vLLM (pull request 11187).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Identity of one full block."""

    digest: bytes
    """Of this block and of everything before it."""
    token_ids: tuple[int, ...]
    """This block's own tokens; compared on a hit, so that a faulty digest is a miss."""


def root_digest(facts: Iterable[str], cache_salt: str | None) -> bytes:
    """Return what the first block's digest is chained to.

    Args:
        facts: What holds for every token of an engine: the model, the type of the cache.
        cache_salt: Requests with different salts share nothing.
    """
    return _digest(repr((tuple(facts), cache_salt)).encode())


def block_key(
    parent: bytes,
    token_ids: Sequence[int],
    positions: bytes,
    pictures: Iterable[tuple[bytes, int]],
) -> BlockKey:
    """Return the key of a full block.

    Args:
        parent: Digest of the block before, or `root_digest`.
        token_ids: The block's tokens.
        positions: Their positions, as bytes of one length for every block.
        pictures: For each picture with a placeholder in the block its digest, and where the block
            begins, counted from the picture's first placeholder.
    """
    parts = [parent, struct.pack(f"<{len(token_ids)}q", *token_ids), positions]
    for digest, offset in pictures:
        parts += [digest, struct.pack("<q", offset)]
    return BlockKey(_digest(b"".join(parts)), tuple(token_ids))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()
