"""The decoder: pre-norm blocks of grouped-query attention and a gated MLP (used by families).

Qwen2, Llama, Mistral, InternLM2 and Phi-3, by configuration. The residual stream is passed beside
the hidden states, so that every sum is fused with the norm that follows it. No weights are read
here and no cache is owned here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgvq_runtime.layers.attention import Attention
from mgvq_runtime.layers.forward_batch import ForwardBatch, LayerCache
from mgvq_runtime.layers.linear import LayerFactory
from mgvq_runtime.layers.mlp import GatedMLP
from mgvq_runtime.layers.norm import RMSNorm
from mgvq_runtime.layers.rope import MRope, inverse_frequencies, llama3_frequencies
from mgvq_runtime.models.decoder_config import DecoderConfig, LinearRope, Llama3Rope, LongRope


class DecoderLayer(nn.Module):
    """One block; takes and returns (what is to be added, the stream it is to be added to)."""

    def __init__(self, name: str, config: DecoderConfig, factory: LayerFactory) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(
            f"{name}.self_attn",
            D,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            (config.qkv_bias, config.o_bias),
            factory,
        )
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = GatedMLP(f"{name}.mlp", D, config.intermediate_size, config.mlp_bias, factory)

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        kv_cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the block's MLP output and the stream before it; their sum is the hidden state.

        Args:
            x: `[T, D]` output of the block before, not yet added; None in the first block.
            residual: `[T, D]` the stream before `x`.
            cos: `[T, Dh]` float32.
            sin: `[T, Dh]` float32.
            batch: Lengths and cache addresses.
            kv_cache: This layer's caches, or None.
        """
        if x is None:
            x = self.input_layernorm(residual)
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, cos, sin, batch, kv_cache)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Token table, blocks and final norm; called `model` in the checkpoint."""

    def __init__(self, name: str, config: DecoderConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.embed_tokens = factory.embedding(
            f"{name}.embed_tokens", config.vocab_size, config.hidden_size
        )
        self.config = config
        scaling = config.rope.scaling
        magnitude = scaling.attention_factor if isinstance(scaling, LongRope) else 1.0
        frequencies = rope_frequencies(config)
        self.rotary_emb = MRope(frequencies, config.rope.mrope_section, magnitude)
        self.layers = nn.ModuleList(
            DecoderLayer(f"{name}.layers.{i}", config, factory)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def set_context_length(self, num_tokens: int) -> None:
        """Choose the rotary frequencies for contexts of up to `num_tokens` tokens.

        Only longrope has two sets; until this is called the short one is used. A set is chosen
        once for all requests: changing it within one would spoil the keys that are cached. So
        requests shorter than the original context differ from transformers, which chooses by each
        forward's length, where the engine was started for longer ones.
        """
        self.rotary_emb.set_frequencies(rope_frequencies(self.config, num_tokens))

    def forward(self, inputs_embeds: Tensor, batch: ForwardBatch) -> Tensor:
        """Return the final hidden states `[T, D]`, normalised.

        Args:
            inputs_embeds: `[T, D]` token and image embeddings.
            batch: Positions, lengths and cache of the requests.
        """
        cos, sin = self.rotary_emb(batch.positions)  # [T, Dh] float32 each
        caches = batch.kv_cache
        x, residual = None, inputs_embeds
        for i, layer in enumerate(self.layers):
            kv_cache = None if caches is None else caches[i]
            x, residual = layer(x, residual, cos, sin, batch, kv_cache)
        return self.norm.add(x, residual)[0] if x is not None else self.norm(residual)


def rope_frequencies(config: DecoderConfig, context_length: int = 0) -> Tensor:
    """Return the angle `[Dh/2]` float32 of each frequency pair at position 1.

    Args:
        config: The decoder's shape.
        context_length: The longest context in use; only longrope's choice depends on it.
    """
    rope = config.rope
    inv_freq = inverse_frequencies(config.head_dim, rope.theta)
    match rope.scaling:
        case LinearRope(factor):
            return inv_freq / factor
        case Llama3Rope(factor, low, high, original):
            return llama3_frequencies(inv_freq, factor, low, high, original)
        case LongRope() as scaling:
            is_long = context_length > scaling.original_max_position_embeddings
            divisors = scaling.long_factor if is_long else scaling.short_factor
            return inv_freq / torch.tensor(divisors, device="cpu")
    return inv_freq
