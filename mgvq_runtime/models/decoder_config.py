"""Shape of the language model, read from a Hugging Face config.json (used by every family).

One `DecoderConfig` describes Qwen2, Llama, Mistral, InternLM2 and Phi-3; only `decoder_from_hf`
knows how their files spell it. What would change an answer and is not implemented is refused by
name. The arithmetic of rotary embeddings is `layers.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mgvq_runtime.models.config_fields import MAX_LAYERS, REQUIRED, Fields

_ALIASES = {"su": "longrope"}
"""Rope types that were renamed; Phi-3's first files say "su"."""


@dataclass(frozen=True)
class LinearRope:
    """Every frequency divided by one number."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Low frequencies divided, high ones kept, those in between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LongRope:
    """Two sets of divisors, one a frequency pair each: for short and for long contexts."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    """The longest context the short set is for."""
    attention_factor: float
    """What cosines and sines are multiplied by, with either set."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the decoder."""

    theta: float
    """Base of the frequencies."""
    mrope_section: tuple[int, int, int]
    """Frequency pairs of the time, height and width axis; they sum to head_dim / 2. A decoder with
    one axis has all of them on the first."""
    scaling: LinearRope | Llama3Rope | LongRope | None = None
    """How the frequencies are stretched. Dynamic NTK is None: within max_position_embeddings it
    does nothing, and longer contexts are refused."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool


@dataclass(frozen=True)
class _Kind:
    """What a decoder's model_type fixes; a bias is fixed, or there is a key that tells."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3")
    has_mrope: bool = False
    is_windowed: bool = False
    """Whether `sliding_window` alone turns sliding windows on."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key that is left out stands for: files leave out what is the class's default."""


def _defaults(max_position_embeddings: int, rms_norm_eps: float = 1e-6) -> Mapping[str, Any]:
    return {
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": 10000.0,
    }


# Source: transformers 5.24 `models/*/configuration_*.py`; internlm2: the hub's
# configuration_internlm2.py.
_KINDS = {
    "qwen2_vl": _Kind(qkv_bias=True, rope_types=("default", "mrope"), has_mrope=True),
    "qwen2": _Kind(qkv_bias=True, defaults=_defaults(32768)),
    "llama": _Kind("attention_bias", "attention_bias", "mlp_bias", defaults=_defaults(2048)),
    "mistral": _Kind(is_windowed=True, defaults=_defaults(131072)),
    "internlm2": _Kind("bias", "bias", defaults={**_defaults(2048), "bias": True}),
    "phi3": _Kind(
        rope_types=("default", "longrope", "su"),
        is_windowed=True,
        defaults=_defaults(4096, rms_norm_eps=1e-5),
    ),
}

_KINDS["qwen2_vl_text"] = _KINDS["qwen2_vl"]  # transformers 5 nests it under this name

DECODER_KINDS = tuple(_KINDS)
"""Every model_type that `decoder_from_hf` reads."""


def decoder_from_hf(fields: Fields, kind: str | None = None) -> DecoderConfig:
    """Read a decoder's part of config.json.

    Args:
        fields: The whole file of a text-only model, or the mapping a family nests.
        kind: One of `DECODER_KINDS`; None takes the mapping's own model_type.

    Raises:
        ConfigError: if a key is missing, of the wrong type or inconsistent with another, or asks
            for something that is not implemented; the message names the key.
    """
    known = _KINDS[kind or fields.one_of("model_type", DECODER_KINDS)]
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    fields.divides("num_key_value_heads", num_kv_heads, "num_attention_heads", num_heads)
    if not fields.has("head_dim"):
        fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        fields.refuse("head_dim", head_dim, "even: rotary embeddings turn pairs")
    fields.one_of("hidden_act", ("silu",), default="silu")
    _refuse_sliding_window(fields, known)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_max_positions(fields, known),
        rms_norm_eps=fields.number("rms_norm_eps", known.defaults.get("rms_norm_eps", REQUIRED)),
        rope=_rope_from_hf(fields, head_dim, known),
        qkv_bias=_bias(fields, known.qkv_bias, known),
        o_bias=_bias(fields, known.o_bias, known),
        mlp_bias=_bias(fields, known.mlp_bias, known),
    )


def _max_positions(fields: Fields, kind: _Kind) -> int:
    key = "max_position_embeddings"
    return fields.integer(key, kind.defaults.get(key, REQUIRED))


def _bias(fields: Fields, rule: bool | str, kind: _Kind) -> bool:
    if isinstance(rule, bool):
        return rule
    return fields.boolean(rule, default=kind.defaults.get(rule, False))


def _rope_from_hf(fields: Fields, head_dim: int, kind: _Kind) -> RopeConfig:
    """Read rope_theta and rope_scaling (hub), or rope_parameters (transformers 5)."""
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    given = fields.mapping(key) if kind.has_mrope else fields.mapping(key, default={})
    rope = Fields(given, f"{fields.prefix}{key}.", fields.file)
    named = [rope.one_of(k, kind.rope_types, default="default") for k in ("type", "rope_type")]
    rope_type = next((name for name in named if name != "default"), "default")
    holder = rope if rope.has("rope_theta") else fields
    theta = holder.number("rope_theta", kind.defaults.get("rope_theta", REQUIRED))
    for holder in (rope, fields):
        if holder.number("partial_rotary_factor", default=1.0) != 1.0:
            holder.refuse(
                "partial_rotary_factor", holder.values["partial_rotary_factor"], "1: whole heads"
            )
    sections = (head_dim // 2, 0, 0)
    if kind.has_mrope:
        first, second, third = rope.integers("mrope_section", 3)
        sections = (first, second, third)
        if 2 * sum(sections) != head_dim:
            wanted = f"sections that sum to head_dim / 2 = {head_dim / 2:g}"
            rope.refuse("mrope_section", list(sections), wanted)
    scaling = _scaling(fields, rope, _ALIASES.get(rope_type, rope_type), head_dim, kind)
    return RopeConfig(theta, sections, scaling)


def _scaling(
    fields: Fields, rope: Fields, rope_type: str, head_dim: int, kind: _Kind
) -> LinearRope | Llama3Rope | LongRope | None:
    """Read what stretches the frequencies; None where nothing does."""
    if rope_type == "linear":
        return LinearRope(rope.number("factor"))
    if rope_type == "llama3":
        return Llama3Rope(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
    if rope_type != "longrope":
        return None
    key = "original_max_position_embeddings"
    original = (fields if fields.has(key) else rope).integer(key, default=4096, low=2)
    stretch = rope.number("factor", default=_max_positions(fields, kind) / original)
    grown = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return LongRope(
        _divisors(rope, "short_factor", head_dim),
        _divisors(rope, "long_factor", head_dim),
        original,
        rope.number("attention_factor", default=grown),
    )


def _divisors(rope: Fields, key: str, head_dim: int) -> tuple[float, ...]:
    values = rope.numbers(key, head_dim // 2)
    if min(values) <= 0:
        rope.refuse(key, min(values), "numbers above 0")
    return values


def _refuse_sliding_window(fields: Fields, kind: _Kind) -> None:
    """Refuse a window that would hide tokens from a layer; one that never bites is fine."""
    window = fields.integer("sliding_window", default=0, low=0)
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    kinds = fields.strings("layer_types", default=[])
    first_windowed = 0 if kind.is_windowed else layers
    first_windowed = fields.integer("max_window_layers", default=first_windowed, low=0)
    is_on = fields.boolean("use_sliding_window", default=kind.is_windowed)
    has_windowed_layer = "sliding_attention" in kinds if kinds else first_windowed < layers
    is_shorter = 0 < window < _max_positions(fields, kind)
    if is_on and has_windowed_layer and is_shorter:
        key, value = (
            ("sliding_window", window) if kind.is_windowed else ("use_sliding_window", True)
        )
        off = "null" if kind.is_windowed else "false"
        fields.refuse(key, value, f"{off}: sliding windows ({window}) are not implemented")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        fields.refuse("layer_types", sorted(unknown), "full_attention in every layer")
