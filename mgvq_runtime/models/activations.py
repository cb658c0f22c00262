"""How much memory a forward takes besides weights and cache, from shapes (called by `engine`).

An upper estimate of what is alive at the worst moment of a block, term by term; not a measurement:
on a GPU the engine runs the worst case for real and takes that instead. Temporaries that ops make
in float32 are counted, the dense copy of a quantized matrix that is decoded for a call too.
"""

from __future__ import annotations

from mgvq_runtime.models.decoder_config import DecoderConfig
from mgvq_runtime.models.vision_config import VisionConfig

_FLOAT_BYTES = 4
SPLIT_TOKENS = 256
"""Tokens of a context that decode attention sums apart (`mgvq_kernels.triton.paged_attention`)."""


def vision_activation_bytes(
    config: VisionConfig, num_patches: int, num_at_once: int, element_bytes: int
) -> int:
    """Return the most bytes alive while pictures of so many patches are encoded.

    Args:
        config: The tower's shape.
        num_patches: P, of all pictures that are encoded in one step.
        num_at_once: Most of them that go through the tower together.
        element_bytes: Bytes of an activation.
    """
    E, F = config.embed_dim, config.intermediate_size
    patches = config.patch_dim * (_FLOAT_BYTES + element_bytes)  # as they came, and cast
    stream = 3 * E * element_bytes  # the stream, its normed copy, a branch's output
    rope = 4 * E * _FLOAT_BYTES if config.rope_theta is not None else 0
    attention = 7 * E * element_bytes + rope  # q, k, v twice, the mixed values
    mlp = 4 * F * element_bytes  # before and after the activation, and its own temporaries
    dense = max(3 * E * E, E * F, config.patch_dim * E) * element_bytes
    # What came out of the tower in parts, put together, and put in its order.
    rows = 3 * (num_patches // config.spatial_merge_size**2) * config.hidden_size * element_bytes
    return num_patches * patches + num_at_once * (stream + max(attention, mlp)) + dense + rows


def decode_graph_bytes(
    config: DecoderConfig, batch_size: int, block_size: int, context: int, element_bytes: int
) -> int:
    """Return the bytes that recorded decode steps hold: their buffers and the largest step.

    So few rows are multiplied straight from codes. What an allocator rounds up is not counted.

    Args:
        config: The decoder's shape.
        batch_size: Requests of the largest recorded step.
        block_size: Tokens of a block.
        context: Most tokens of a request.
        element_bytes: Bytes of an activation.
    """
    D, V = config.hidden_size, config.vocab_size
    table = -(-context // block_size) * 4
    buffers = D * element_bytes + 5 * 8 + table + V * _FLOAT_BYTES
    splits = -(-context // SPLIT_TOKENS) * config.num_attention_heads * (config.head_dim + 2)
    step = max(splits * _FLOAT_BYTES + _token_bytes(config, element_bytes), V * 2 * _FLOAT_BYTES)
    return batch_size * (buffers + step)


def decoder_activation_bytes(
    config: DecoderConfig, num_tokens: int, context: int, num_logits: int, element_bytes: int
) -> int:
    """Return the most bytes alive while one chunk of a prompt is read.

    Args:
        config: The decoder's shape.
        num_tokens: T, tokens of the chunk.
        context: Tokens before and in the chunk.
        num_logits: Rows that get logits, one a request.
        element_bytes: Bytes of an activation.
    """
    D, F, Dh = config.hidden_size, config.intermediate_size, config.head_dim
    H, Hk = config.num_attention_heads, config.num_key_value_heads
    pages = 4 * context * Hk * Dh * element_bytes  # keys and values, gathered and laid out
    mask = num_tokens * context * (1 + _FLOAT_BYTES)
    dense = max(2 * F * D, (H + 2 * Hk) * Dh * D) * element_bytes
    layer = num_tokens * _token_bytes(config, element_bytes) + pages + mask + dense
    head = num_tokens * D * element_bytes + num_logits * config.vocab_size * 2 * _FLOAT_BYTES
    return max(layer, head)


def _token_bytes(config: DecoderConfig, element_bytes: int) -> int:
    """Return what a token takes at the worst moment of a block."""
    D, F, Dh = config.hidden_size, config.intermediate_size, config.head_dim
    H, Hk = config.num_attention_heads, config.num_key_value_heads
    stream = 4 * D * element_bytes + 2 * D * _FLOAT_BYTES  # stream, branch, norm in float32
    attention = (2 * H + 4 * Hk) * Dh * element_bytes + 3 * (H + Hk) * Dh * _FLOAT_BYTES
    mlp = 3 * F * element_bytes + 3 * F * _FLOAT_BYTES
    return stream + max(attention, mlp)
