"""How published folders of the families with pictures spell their parameters (for `hf_names`).

Vision towers and projectors, and each family's dialects: which decoder is nested where.

Source: transformers 5.24 `conversion_mapping.py`, `models/siglip` and `models/internvl`;
`siglip_encoder.py` of LLaVA-VL/LLaVA-NeXT; `modeling_intern_vit.py` of OpenGVLab/InternVL2-2B.
"""

from __future__ import annotations

import dataclasses

from mgvq_runtime.checkpoint.hf_decoders import DECODERS, LLAMA, RECOMPUTED
from mgvq_runtime.checkpoint.name_rules import Change, Dialect, Rule, both, prefixed


def _convolution(*theirs: str) -> Rule:
    """Return the rule of a patch embedding's kernel."""
    ours = "patch_embed.proj.weight"
    return Rule(ours, theirs or (ours,), change=Change.FLATTENED)


QWEN2_VL_TOWER = (
    _convolution(),
    *both("blocks.{}.norm1"),
    *both("blocks.{}.norm2"),
    *both("blocks.{}.attn.qkv"),
    *both("blocks.{}.attn.proj"),
    *both("blocks.{}.mlp.fc1"),
    *both("blocks.{}.mlp.fc2"),
    *both("merger.ln_q"),
    *both("merger.mlp.0"),
    *both("merger.mlp.2"),
)

_LAYER, _LAYER_HF = "encoder.layers.{}", "encoder.layer.{}"
SIGLIP = (
    _convolution("embeddings.patch_embedding.weight"),
    Rule("patch_embed.proj.bias", ("embeddings.patch_embedding.bias",)),
    Rule("position_embedding", ("embeddings.position_embedding.weight",)),
    *both("blocks.{}.norm1", f"{_LAYER}.layer_norm1"),
    *both("blocks.{}.norm2", f"{_LAYER}.layer_norm2"),
    *both("blocks.{}.attn.qkv", *(f"{_LAYER}.self_attn.{part}_proj" for part in "qkv")),
    *both("blocks.{}.attn.proj", f"{_LAYER}.self_attn.out_proj"),
    *both("blocks.{}.mlp.fc1", f"{_LAYER}.mlp.fc1"),
    *both("blocks.{}.mlp.fc2", f"{_LAYER}.mlp.fc2"),
)
NEVER_RUN = tuple(
    rf"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?{name}"
    for name in (
        r"encoder\.layers\.26\..*",  # so400m has 27 blocks, LLaVA-OneVision runs 26
        r"post_layernorm\..*",
        r"head\..*",
        r"embeddings\.position_ids",
    )
)
"""What SigLIP has and LLaVA-OneVision leaves out."""


def _maybe_biased(stem: str, *theirs: str) -> tuple[Rule, ...]:
    """Return the rules of a module whose bias some sizes lack."""
    weight, bias = both(stem, *theirs)
    return weight, dataclasses.replace(bias, is_required=False)


def _intern_vit(qkv: tuple[str, ...], attention: str, **names: str) -> tuple[Rule, ...]:
    """Return the rules of InternViT's blocks, given what stands behind the block's number."""
    return (
        *_maybe_biased("blocks.{}.norm1", names["norm1"]),
        *_maybe_biased("blocks.{}.norm2", names["norm2"]),
        *_maybe_biased("blocks.{}.attn.qkv", *qkv),
        *(
            Rule(f"blocks.{{}}.attn.{norm}.weight", (f"{attention}.{norm}.weight",), False)
            for norm in ("q_norm", "k_norm")
        ),
        *both("blocks.{}.attn.proj", names["proj"]),
        *both("blocks.{}.mlp.fc1", names["mlp"] + ".fc1"),
        *both("blocks.{}.mlp.fc2", names["mlp"] + ".fc2"),
        *(Rule(f"blocks.{{}}.{scale}", (names[scale],)) for scale in ("ls1", "ls2")),
    )


INTERN_VIT = (
    Rule("class_embedding", ("embeddings.class_embedding",), change=Change.SQUEEZED),
    Rule("position_embedding", ("embeddings.position_embedding",), change=Change.SQUEEZED),
    _convolution("embeddings.patch_embedding.weight"),
    Rule("patch_embed.proj.bias", ("embeddings.patch_embedding.bias",)),
    *_intern_vit(
        (f"{_LAYER}.attn.qkv",),
        f"{_LAYER}.attn",
        proj=f"{_LAYER}.attn.proj",
        **{name: f"{_LAYER}.{name}" for name in ("norm1", "norm2", "mlp", "ls1", "ls2")},
    ),
)
INTERN_VIT_HF = (
    Rule("class_embedding", ("embeddings.cls_token",), change=Change.SQUEEZED),
    Rule("position_embedding", ("embeddings.position_embeddings",), change=Change.SQUEEZED),
    _convolution("embeddings.patch_embeddings.projection.weight"),
    Rule("patch_embed.proj.bias", ("embeddings.patch_embeddings.projection.bias",)),
    *_intern_vit(
        tuple(f"{_LAYER_HF}.attention.{part}_proj" for part in "qkv"),
        f"{_LAYER_HF}.attention",
        proj=f"{_LAYER_HF}.attention.projection_layer",
        norm1=f"{_LAYER_HF}.layernorm_before",
        norm2=f"{_LAYER_HF}.layernorm_after",
        mlp=f"{_LAYER_HF}.mlp",
        ls1=f"{_LAYER_HF}.lambda_1",
        ls2=f"{_LAYER_HF}.lambda_2",
    ),
)


def _merger(**names: str) -> tuple[Rule, ...]:
    """Return the rules of a projector's modules: our number, their name."""
    return tuple(rule for n, name in names.items() for rule in both(f"merger.{n[1:]}", name))


MLP = _merger(_0="0", _2="2")
MLP_HF = _merger(_0="linear_1", _2="linear_2")
MLP1 = _merger(_0="0", _1="1", _3="3")
MLP1_HF = _merger(_0="layer_norm", _1="linear_1", _3="linear_2")


def _newline(prefix: str) -> Rule:
    return Rule("visual.image_newline", (f"{prefix}image_newline",))


def _llava(name: str, tower: str, projector: tuple[str, tuple[Rule, ...]], *rest: Rule) -> Dialect:
    prefix, mlp = projector
    rules = (*prefixed(tower, "visual.", SIGLIP), *prefixed(prefix, "visual.", mlp), *rest)
    return Dialect(f"LLaVA-OneVision, {name}", rules, (*RECOMPUTED, *NEVER_RUN))


_LLAVA_5 = (_newline("model."), *LLAMA.under("model.language_model.", ""))
_LLAVA_4 = (_newline(""), *LLAMA.under("language_model.model.", "language_model."))
LLAVA_ONEVISION = (
    _llava(
        "transformers 5",
        "model.vision_tower.",
        ("model.multi_modal_projector.", MLP_HF),
        *_LLAVA_5,
    ),
    _llava(
        "transformers 5 with SigLIP's old names",
        "model.vision_tower.vision_model.",
        ("model.multi_modal_projector.", MLP_HF),
        *_LLAVA_5,
    ),
    _llava(
        "transformers 5 with older prefixes",
        "vision_tower.",
        ("multi_modal_projector.", MLP_HF),
        *_LLAVA_4,
    ),
    _llava(
        "transformers 4",
        "vision_tower.vision_model.",
        ("multi_modal_projector.", MLP_HF),
        *_LLAVA_4,
    ),
    _llava(
        "lmms-lab",
        "model.vision_tower.vision_tower.vision_model.",
        ("model.mm_projector.", MLP),
        _newline("model."),
        *LLAMA.under("model.", ""),
    ),
)

INTERNVL2 = (
    *(
        Dialect(
            f"InternVL2, hub, {decoder.name}",
            (
                *prefixed("vision_model.", "visual.", INTERN_VIT),
                *prefixed("mlp1.", "visual.", MLP1),
                *decoder.under("language_model.model.", "language_model."),
            ),
            RECOMPUTED,
        )
        for decoder in DECODERS
    ),
    *(
        Dialect(
            f"InternVL2, {name}",
            (
                *prefixed(f"{prefix}vision_tower.", "visual.", INTERN_VIT_HF),
                *prefixed(f"{prefix}multi_modal_projector.", "visual.", MLP1_HF),
                *LLAMA.under(body, head),
            ),
            RECOMPUTED,
        )
        for name, prefix, body, head in (
            ("transformers 5", "model.", "model.language_model.", ""),
            ("transformers 4", "", "language_model.model.", "language_model."),
        )
    ),
)

VISION_DIALECTS = (
    Dialect(
        "Qwen2-VL, transformers 5",
        (
            *prefixed("model.visual.", "visual.", QWEN2_VL_TOWER),
            *LLAMA.under("model.language_model.", ""),
        ),
        RECOMPUTED,
    ),
    Dialect(
        "Qwen2-VL, hub",
        (*prefixed("visual.", "visual.", QWEN2_VL_TOWER), *LLAMA.under("model.", "")),
        RECOMPUTED,
    ),
    *LLAVA_ONEVISION,
    *INTERNVL2,
)
