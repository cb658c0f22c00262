"""How published folders of the families with pictures spell their parameters (for `hf_names`).

Vision towers and projectors, and each family's dialects: which decoder is nested where.
"""

from __future__ import annotations

from mgvq_runtime.checkpoint.hf_decoders import LLAMA, RECOMPUTED
from mgvq_runtime.checkpoint.name_rules import Change, Dialect, Rule, both, prefixed

_QWEN2_VL_PATCHES = "patch_embed.proj.weight"
QWEN2_VL_TOWER = (
    Rule(_QWEN2_VL_PATCHES, (_QWEN2_VL_PATCHES,), change=Change.FLATTENED),
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
)
