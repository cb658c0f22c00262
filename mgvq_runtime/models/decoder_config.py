"""Shape of the language model, read from a Hugging Face config.json (used by `models.config`).

Only `decoder_from_hf` knows the file's spellings. What would change an answer and is not
implemented is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgvq_runtime.models.config_fields import Fields

_ROPE_TYPES = ("default", "mrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the decoder."""

    theta: float
    """Base of the frequencies."""
    mrope_section: tuple[int, int, int]
    """Frequency pairs of the time, height and width axis; they sum to head_dim / 2."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads


def decoder_from_hf(fields: Fields) -> DecoderConfig:
    """Read the language model's part."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    fields.divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim * num_heads != hidden_size:
        fields.refuse("head_dim", head_dim, f"hidden_size / num_attention_heads ({hidden_size})")
    fields.one_of("hidden_act", ("silu",), default="silu")
    _refuse_sliding_window(fields)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=_rope_from_hf(fields, head_dim),
    )


def _rope_from_hf(fields: Fields, head_dim: int) -> RopeConfig:
    """Read rope_theta and rope_scaling (hub), or rope_parameters (transformers 5)."""
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = Fields(fields.mapping(key), f"{fields.prefix}{key}.")
    for name in ("type", "rope_type"):
        rope.one_of(name, _ROPE_TYPES, default="default")
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta")
    sections = rope.integers("mrope_section", 3)
    if 2 * sum(sections) != head_dim:
        rope.refuse(
            "mrope_section", list(sections), f"sections that sum to head_dim / 2 = {head_dim / 2:g}"
        )
    return RopeConfig(theta, (sections[0], sections[1], sections[2]))


def _refuse_sliding_window(fields: Fields) -> None:
    """Refuse a window that would hide tokens from a layer; one that never bites is fine."""
    window = fields.integer("sliding_window", default=0, low=0)
    layers = fields.integer("num_hidden_layers")
    kinds = fields.strings("layer_types", default=[])
    first_windowed = fields.integer("max_window_layers", default=layers, low=0)
    is_on = fields.boolean("use_sliding_window", default=False)
    has_windowed_layer = "sliding_attention" in kinds if kinds else first_windowed < layers
    is_shorter = 0 < window < fields.integer("max_position_embeddings")
    if is_on and has_windowed_layer and is_shorter:
        fields.refuse(
            "use_sliding_window", True, f"false: sliding windows ({window}) are not implemented"
        )
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        fields.refuse("layer_types", sorted(unknown), "full_attention in every layer")
