"""Rename tables, as data: tensors of known Hugging Face folders to our parameters.

Called by the reader for unquantized folders. A family is a list of the parameters it must have, the
dialects its folders are written in, and which projections we store fused; the code below knows no
model. The dialect is found from the names in the file, never from the config. A name no table
explains is an error, and so is a parameter no name fills. Our own checkpoints need none of this.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mgvq_runtime.errors import CheckpointError


@dataclass(frozen=True)
class Dialect:
    """One way of prefixing the same parameters."""

    name: str
    prefixes: tuple[tuple[str, str], ...]
    """(prefix in the file, prefix in our names); the first that fits is taken."""


@dataclass(frozen=True)
class Family:
    """The parameters of one model family, in Hugging Face's names after the dialect's prefix."""

    name: str
    dialects: tuple[Dialect, ...]
    required: tuple[str, ...]
    """`{}` stands for a block's number; every block must have all of its parameters."""
    optional: tuple[str, ...]
    ignored: tuple[str, ...]
    """Endings of tensors that are recomputed, never loaded."""
    fused: Mapping[str, tuple[str, ...]]
    """Our projection: the ones it is made of, stacked along the rows in this order."""
    flattened: tuple[str, ...]
    """Convolution kernels `[E, ...]` that we apply as matrices `[E, prod(...)]`."""


@dataclass(frozen=True)
class Source:
    """Which tensors of a folder make one of our parameters."""

    parts: tuple[str, ...]
    """Names in the folder; more than one are stacked along the rows."""
    flattened: bool = False


def _with(stem: str, *endings: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{ending}" for ending in endings)


_BOTH = ("weight", "bias")

QWEN2_VL = Family(
    name="Qwen2-VL",
    dialects=(
        Dialect(
            "transformers 5",
            (
                ("model.visual.", "visual."),
                ("model.language_model.", "model."),
                ("lm_head.", "lm_head."),
            ),
        ),
        Dialect(
            "hub",
            (("visual.", "visual."), ("model.", "model."), ("lm_head.", "lm_head.")),
        ),
    ),
    required=(
        "visual.patch_embed.proj.weight",
        *_with("visual.blocks.{}.norm1", *_BOTH),
        *_with("visual.blocks.{}.norm2", *_BOTH),
        *_with("visual.blocks.{}.attn.qkv", *_BOTH),
        *_with("visual.blocks.{}.attn.proj", *_BOTH),
        *_with("visual.blocks.{}.mlp.fc1", *_BOTH),
        *_with("visual.blocks.{}.mlp.fc2", *_BOTH),
        *_with("visual.merger.ln_q", *_BOTH),
        *_with("visual.merger.mlp.0", *_BOTH),
        *_with("visual.merger.mlp.2", *_BOTH),
        "model.embed_tokens.weight",
        "model.layers.{}.input_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        *_with("model.layers.{}.self_attn.q_proj", *_BOTH),
        *_with("model.layers.{}.self_attn.k_proj", *_BOTH),
        *_with("model.layers.{}.self_attn.v_proj", *_BOTH),
        "model.layers.{}.self_attn.o_proj.weight",
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
        "model.layers.{}.mlp.down_proj.weight",
        "model.norm.weight",
    ),
    optional=("lm_head.weight",),  # absent where the head is the embedding
    ignored=("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"),
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    flattened=("visual.patch_embed.proj.weight",),
)

FAMILIES: tuple[Family, ...] = (QWEN2_VL,)


def map_names(names: Collection[str]) -> dict[str, Source]:
    """Explain every tensor of an unquantized folder.

    Args:
        names: all tensor names of the folder.

    Returns:
        Our parameter names, each with the tensors it is made of; all of `names` are consumed, but
        for the recomputed ones a family ignores.

    Raises:
        CheckpointError: if no dialect fits, listing the known ones; or with every unknown name,
            every missing tensor and every gap in the numbers of the blocks.
    """
    family, dialect = detect(names)
    renamed: dict[str, str] = {}
    problems: list[str] = []
    patterns = {pattern: _pattern(pattern) for pattern in (*family.required, *family.optional)}
    blocks: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if name.endswith(family.ignored):
            continue
        ours = _rename(name, dialect)
        matches = [m for pattern in patterns.values() if ours and (m := pattern.fullmatch(ours))]
        if not ours or not matches:
            problems.append(f"unknown tensor {name[:200]}")
            continue
        if matches[0].groups():
            blocks[_block_stem(ours)].add(int(matches[0].group(1)))
        renamed[ours] = name
    problems += _missing(family, dialect, renamed, blocks)
    if problems:
        raise CheckpointError(
            f"the tensors are not those of a {family.name} model ({dialect.name} names)", problems
        )
    return _fuse(family, renamed)


def detect(names: Collection[str]) -> tuple[Family, Dialect]:
    """Find the family and dialect that explain most names; the earlier one on a tie.

    Raises:
        CheckpointError: if none explains half of them; the message lists the known dialects.
    """
    best, best_count = None, 0
    for family in FAMILIES:
        patterns = [_pattern(pattern) for pattern in (*family.required, *family.optional)]
        for dialect in family.dialects:
            ours = (_rename(name, dialect) for name in names)
            count = sum(any(p.fullmatch(n) for p in patterns) for n in ours if n)
            if count > best_count:
                best, best_count = (family, dialect), count
    if best is None or best_count * 2 < len(names):
        known = "; ".join(f"{f.name} ({', '.join(d.name for d in f.dialects)})" for f in FAMILIES)
        sample = ", ".join(sorted(name[:80] for name in names)[:3]) or "none"
        raise CheckpointError(
            f"the tensor names fit no known model; known: {known}; the first names here: {sample}"
        )
    return best


def _missing(
    family: Family, dialect: Dialect, renamed: Mapping[str, str], blocks: Mapping[str, set[int]]
) -> list[str]:
    """List required parameters that nothing fills, in the names the folder would use."""
    problems = []
    for stem in sorted({_block_stem(p) for p in family.required if "{}" in p}):
        numbers = blocks.get(stem, set())
        if not numbers:
            problems.append(f"there is no {_original(stem, dialect)}.0")
        elif max(numbers) >= len(numbers):
            gap = next(n for n in range(len(numbers)) if n not in numbers)
            problems.append(f"{_original(stem, dialect)}.{gap} is missing, later ones are there")
    for pattern in family.required:
        block_numbers = sorted(blocks.get(_block_stem(pattern), ())) if "{}" in pattern else [0]
        for name in (pattern.replace("{}", str(n)) for n in block_numbers):
            if name not in renamed:
                problems.append(f"missing tensor {_original(name, dialect)}")
    return problems


def _fuse(family: Family, renamed: Mapping[str, str]) -> dict[str, Source]:
    """Group the parts of fused projections; everything else stays alone."""
    places = {
        part: (whole, parts.index(part)) for whole, parts in family.fused.items() for part in parts
    }
    sources: dict[str, Source] = {}
    for ours, original in renamed.items():
        words = ours.split(".")
        if len(words) < 2 or words[-2] not in places:
            sources[ours] = Source((original,), ours in family.flattened)
            continue
        whole, index = places[words[-2]]
        if index:
            continue
        siblings = (".".join((*words[:-2], p, words[-1])) for p in family.fused[whole])
        fused = ".".join((*words[:-2], whole, words[-1]))
        sources[fused] = Source(tuple(renamed[sibling] for sibling in siblings))
    return sources


def _rename(name: str, dialect: Dialect) -> str | None:
    for theirs, ours in dialect.prefixes:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return None


def _original(name: str, dialect: Dialect) -> str:
    """Spell one of our names as the dialect does, for messages."""
    for theirs, ours in dialect.prefixes:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{\}", r"(0|[1-9][0-9]{0,4})"))


def _block_stem(name: str) -> str:
    """Return the part before the block's number: "model.layers" of "model.layers.7.mlp...."."""
    return re.split(r"\.(?:\{\}|[0-9]+)\.", name, maxsplit=1)[0]
