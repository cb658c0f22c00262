"""What a quantized checkpoint costs, counted in full (called by the writer, inspect, quantizer).

Bits of codes, codebooks with their scales, row scales and permutations, a group of matrices at a
time. Reads no file. Norms, biases and other fp16 tensors are not quantized and not in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec
from mgvq_runtime.errors import CheckpointError

GROUP_PREFIXES = (
    ("visual.merger.", "projector"),
    ("visual.", "vision"),
    ("model.layers.", "decoder"),
    ("model.embed_tokens", "embedding"),
    ("lm_head", "embedding"),
)
"""First prefix that fits; a matrix that fits none is in the group "other"."""

TOTAL = "total"
CLAIM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class BitCount:
    """Stored bits of some matrices, by what they are spent on."""

    weights: int = 0
    """Weights of the dense matrices."""
    codes: int = 0
    codebooks: int = 0
    """Entries and scales of the codebooks, a shared one counted once."""
    scales: int = 0
    permutation: int = 0

    @property
    def bits(self) -> int:
        """All stored bits."""
        return self.codes + self.codebooks + self.scales + self.permutation

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight; 0 where there is no weight."""
        return self.bits / self.weights if self.weights else 0.0

    def __add__(self, other: BitCount) -> BitCount:
        return BitCount(
            self.weights + other.weights,
            self.codes + other.codes,
            self.codebooks + other.codebooks,
            self.scales + other.scales,
            self.permutation + other.permutation,
        )


def group_of(name: str) -> str:
    """Return the group of a matrix: decoder, embedding, vision, projector or other."""
    for prefix, group in GROUP_PREFIXES:
        if name.startswith(prefix):
            return group
    return "other"


def count_bits(matrices: Mapping[str, MatrixSpec]) -> dict[str, BitCount]:
    """Count the stored bits of quantized matrices.

    A shared codebook is counted once, in the group of the first matrix (by name) that uses it.

    Args:
        matrices: how each matrix is stored, by module name.

    Returns:
        Counts by group, groups without a matrix left out, and the "total" last.
    """
    counts: dict[str, BitCount] = {}
    counted: set[str] = set()
    for name in sorted(matrices):
        group = group_of(name)
        counts[group] = counts.get(group, BitCount()) + _count_matrix(matrices[name], counted)
    counts[TOTAL] = sum(counts.values(), BitCount())
    return counts


def counted_bits_per_weight(matrices: Mapping[str, MatrixSpec]) -> dict[str, float]:
    """Return stored bits a weight by group, and the "total"."""
    return {group: count.bits_per_weight for group, count in count_bits(matrices).items()}


def check_claims(quantization: QuantizationSpec) -> None:
    """Refuse a checkpoint whose stated bits a weight are not those of its matrices.

    Raises:
        CheckpointError: naming every group whose number is wrong or unknown, with both numbers.
    """
    counted = counted_bits_per_weight(quantization.matrices)
    problems = []
    for group, claim in quantization.bits_per_weight.items():
        if group == "target":
            continue
        if group not in counted:
            problems.append(f"{group[:100]!r} is stated, but no matrix belongs to it")
        elif not abs(claim - counted[group]) <= CLAIM_TOLERANCE * counted[group]:
            problems.append(f"{group!r} is stated as {claim}, counted {counted[group]:.6f}")
    if problems:
        raise CheckpointError("bits_per_weight does not describe this checkpoint", problems)


def _count_matrix(matrix: MatrixSpec, counted: set[str]) -> BitCount:
    """Count one matrix, adding the shared codebooks it pays for to `counted`."""
    layout = matrix.layout
    codebooks = 0
    for band, names in zip(layout.bands, matrix.codebooks, strict=True):
        for stage, shared in zip(band.stages, names, strict=True):
            if shared in counted:
                continue
            codebooks += 8 * stage.codebook_size * stage.vector_dim + 32
            if shared is not None:
                counted.add(shared)
    return BitCount(
        weights=layout.num_weights,
        codes=layout.code_bits(),
        codebooks=codebooks,
        scales=16 * layout.out_features,
        permutation=layout.channel_bits * layout.in_features if layout.has_permutation else 0,
    )
