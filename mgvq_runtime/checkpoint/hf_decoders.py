"""How published folders spell a decoder's parameters (tables for `hf_names` and `hf_vision`).

Three spellings: Qwen2's, Llama's and Mistral's; Phi-3's, which keeps q/k/v and gate/up fused as we
do; InternLM2's. Families nest them under prefixes of their own. Biases may be absent here; which
of them a model has is its config's business.

Source: transformers 5.24 `models/{llama,qwen2,phi3}`; OpenGVLab/InternVL2-2B modeling_internlm2.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgvq_runtime.checkpoint.name_rules import Change, Dialect, Rule, prefixed, same


@dataclass(frozen=True)
class DecoderNames:
    """One spelling of a decoder."""

    name: str
    body: tuple[Rule, ...]
    """Token table, blocks and final norm."""
    head: Rule
    """The output head, absent where it is the token table."""

    def under(self, body: str, head: str) -> tuple[Rule, ...]:
        """Return the rules of this decoder in a folder.

        Args:
            body: What stands before the body's names there, such as "language_model.model.".
            head: What stands before the head's name.
        """
        return (*prefixed(body, "model.", self.body), *prefixed(head, "", (self.head,)))


def _layer(name: str, *theirs: str, is_required: bool = True, leaf: str = "weight") -> Rule:
    """Return the rule of one tensor of a block."""
    names = tuple(f"layers.{{}}.{part}.{leaf}" for part in theirs or (name,))
    return Rule(f"layers.{{}}.{name}.{leaf}", names, is_required)


def _optional_bias(name: str, *theirs: str) -> Rule:
    return _layer(name, *theirs, is_required=False, leaf="bias")


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_COMMON = (
    *same("embed_tokens.weight"),
    _layer("input_layernorm"),
    _layer("self_attn.o_proj"),
    _optional_bias("self_attn.o_proj"),
    _layer("post_attention_layernorm"),
    _layer("mlp.down_proj"),
    _optional_bias("mlp.down_proj"),
    *same("norm.weight"),
)
_HEAD = Rule("lm_head.weight", ("lm_head.weight",), is_required=False)

LLAMA = DecoderNames(
    "Llama or Qwen2",
    (
        *_COMMON,
        _layer("self_attn.qkv_proj", *_QKV),
        _optional_bias("self_attn.qkv_proj", *_QKV),
        _layer("mlp.gate_up_proj", *_GATE_UP),
        _optional_bias("mlp.gate_up_proj", *_GATE_UP),
    ),
    _HEAD,
)

PHI3 = DecoderNames(
    "Phi-3", (*_COMMON, _layer("self_attn.qkv_proj"), _layer("mlp.gate_up_proj")), _HEAD
)


def _wqkv(leaf: str, is_required: bool) -> Rule:
    ours, theirs = f"layers.{{}}.self_attn.qkv_proj.{leaf}", f"layers.{{}}.attention.wqkv.{leaf}"
    return Rule(ours, (theirs,), is_required, Change.HEADS_SORTED)


INTERNLM2 = DecoderNames(
    "InternLM2",
    (
        Rule("embed_tokens.weight", ("tok_embeddings.weight",)),
        _layer("input_layernorm", "attention_norm"),
        _wqkv("weight", is_required=True),
        _wqkv("bias", is_required=False),
        _layer("self_attn.o_proj", "attention.wo"),
        _optional_bias("self_attn.o_proj", "attention.wo"),
        _layer("post_attention_layernorm", "ffn_norm"),
        _layer("mlp.gate_up_proj", "feed_forward.w1", "feed_forward.w3"),
        _layer("mlp.down_proj", "feed_forward.w2"),
        *same("norm.weight"),
    ),
    Rule("lm_head.weight", ("output.weight",), is_required=False),
)

DECODERS = (LLAMA, PHI3, INTERNLM2)
RECOMPUTED = (r".*\.rotary_emb\.inv_freq", r".*\.rotary_pos_emb\.inv_freq")
"""Frequencies that some folders store."""

TEXT_DIALECTS = tuple(
    Dialect(names.name, names.under("model.", ""), RECOMPUTED) for names in DECODERS
)
"""Text-only folders."""
