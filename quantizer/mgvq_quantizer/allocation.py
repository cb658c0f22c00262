"""How each matrix is cut into bands of rates, and who shares tables (called by `pipeline`).

The bands come from `precision`, or every group of matrices has one rate. Not here: which bands are
best (`budget`), what a rate costs in quality (`sensitivity`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from mgvq_kernels.layout import Band, VQLayout, rate_stages
from mgvq_quantizer.channel_classes import SHARED, Channels, class_names, cut_bands
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.trellis_search import COMMON_TAIL, TAILS
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.checkpoint.spec import MatrixSpec
from mgvq_runtime.errors import ConfigError

Bands = Sequence[tuple[int, int]]
"""Rate and width in channels of each band of a matrix, from left to right."""
_TAILS_OVERHEAD = 0.01
"""Bits a weight that matrices may spend on a choice of tables for a trellis they share."""


@dataclass(frozen=True)
class MatrixPlan:
    """What is to be done with one matrix."""

    name: str
    """The module's name, as in the checkpoint."""
    layout: VQLayout
    label: str
    """What its tables are named after: the matrix itself, or all that share them."""
    classes: tuple[str, ...]
    """[band]: of `channel_classes`; bands of one rate and class read the same tables."""
    channels: tuple[tuple[int, ...], ...] = ()
    """[band]: which ones it takes; empty where bands are cut from the order of all channels."""
    tails: tuple[int, ...] = ()
    """[band]: places in `trellis_search.TAILS`; empty where tables are not those of a shared
    trellis."""
    chooses_tails: bool = False
    """Whether its bands take the tails that fit them, once their channels are known."""

    @property
    def shared(self) -> bool:
        """Whether other matrices read the same tables."""
        return self.label != self.name

    @property
    def tables(self) -> tuple[tuple[str, ...], ...]:
        """[band][stage]: the name of the table its codes point into."""
        suffixes = [f"-tail{tail}" for tail in self.tails]  # untrained: alike for all classes
        suffixes = suffixes or ["" if name == SHARED else f"-{name}" for name in self.classes]
        return tuple(
            tuple(f"{self.label}-{band.rate}bit{suffix}-{s}" for s in range(len(band.stages)))
            for band, suffix in zip(self.layout.bands, suffixes, strict=True)
        )

    @property
    def spec(self) -> MatrixSpec:
        """The matrix as the checkpoint describes it."""
        return MatrixSpec(self.layout, self.tables if self.shared else ())


def plan(
    model: nn.Module,
    recipe: QuantRecipe,
    bands: Mapping[str, Bands] | None = None,
    channels: Mapping[str, Channels] | None = None,
) -> dict[str, MatrixPlan]:
    """Lay out every matrix of a dense model.

    A matrix whose width is no multiple of 8, or that the recipe keeps, stays dense. One shares its
    tables with the same matrix of other layers when tables of its own would cost more than the
    recipe allows.

    Args:
        model: a model of `mgvq_runtime.models`, dense.
        recipe: rates and limits.
        bands: of the matrices that have several rates, by module name.
        channels: of the matrices whose bands are cut into classes, by module name.

    Returns:
        The plans by module name, in the model's order.

    Raises:
        ConfigError: if a pattern of `recipe.keep` fits no matrix, or they leave none.
    """
    shapes = _unless_kept(matrix_shapes(model), recipe)
    bands, channels = bands or {}, channels or {}
    siblings: dict[object, list[set[str]]] = defaultdict(list)
    for name, shape in shapes.items():
        classes = class_names(channels.get(name), recipe.class_threshold)
        siblings[kind_of(name), shape].append(classes)
    plans = {}
    for name, (rows, columns) in shapes.items():
        mine = bands.get(name) or [(_lowest_rate(name, recipe), columns)]
        alike = siblings[kind_of(name), (rows, columns)]
        plans[name] = plan_matrix(name, rows, mine, recipe, alike, channels.get(name))
    return _with_tails(plans, recipe)


def _lowest_rate(name: str, recipe: QuantRecipe) -> int:
    """Return the rate of a matrix whose bands are not chosen yet."""
    rates = recipe.rates_of(group_of(name))
    if group_of(name) == "embedding":
        return max(rate for rate in rates if rate <= recipe.embedding_bits)
    return rates[0]


def _with_tails(plans: Mapping[str, MatrixPlan], recipe: QuantRecipe) -> dict[str, MatrixPlan]:
    """Let the matrices of a shared trellis choose tails if they are enough to pay for the tables.

    The others take the common one.
    """
    weights: dict[str, int] = defaultdict(int)
    for matrix in plans.values():
        weights[matrix.label] += matrix.layout.num_weights
    settled = {}
    for name, matrix in plans.items():
        if matrix.shared and matrix.layout.codec == "trellis":
            rates = recipe.rates_of(group_of(name))
            cost = len(TAILS) * sum(table_bits(rate, recipe) for rate in rates)
            matrix = replace(
                matrix,
                tails=(COMMON_TAIL,) * len(matrix.layout.bands),
                chooses_tails=cost <= _TAILS_OVERHEAD * weights[matrix.label],
            )
        settled[name] = matrix
    return settled


def matrix_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return `(O, I)` of every matrix that can be quantized, by module name."""
    return {
        name: (int(module.weight.shape[0]), int(module.weight.shape[1]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 8 == 0
    }


def dense_weights(model: nn.Module, plans: Mapping[str, MatrixPlan]) -> int:
    """Return how many weights the matrices hold that are not planned."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name not in plans
    )


def plan_matrix(
    name: str,
    rows: int,
    bands: Bands,
    recipe: QuantRecipe,
    alike: Sequence[set[str]],
    channels: Channels | None = None,
) -> MatrixPlan:
    """Lay out one matrix.

    Whether it shares its tables depends on all rates its group may have, not on those it got, and
    on all classes that it or its siblings have.

    Args:
        name: of the matrix.
        rows: `O`.
        bands: rate and width of each.
        recipe: rates and limits.
        alike: the classes of each matrix of its kind and shape, its own among them.
        channels: what its bands are cut by; None leaves them whole.
    """
    cuts = cut_bands(bands, channels, recipe.class_threshold)
    cut, start = [], 0
    for part in cuts:
        cut.append(Band(start, part.width, rate_stages(part.rate, recipe.codec, recipe.window)))
        start += part.width
    layout = VQLayout(rows, start, tuple(cut), has_permutation=recipe.permute)
    tables_bits = sum(table_bits(rate, recipe) for rate in recipe.rates_of(group_of(name)))
    tables_bits *= len(set().union(*alike))
    shared = len(alike) > 1 and tables_bits > recipe.max_codebook_overhead * layout.num_weights
    label = _shared_label(name, layout) if shared else name
    members = tuple(part.channels for part in cuts)
    classes = tuple(part.channel_class for part in cuts)
    return MatrixPlan(name, layout, label, classes, members if all(members) else ())


def _shared_label(name: str, layout: VQLayout) -> str:
    """Return what shared tables are named after: kind and shape, or with a trellis the group.

    Divided rows are near to normal, so that a trellis needs no table of its own kind of matrix.
    """
    if layout.codec == "trellis":
        return f"trellis-{group_of(name)}"
    return f"{kind_of(name)}-{layout.out_features}x{layout.in_features}"


def table_bits(rate: int, recipe: QuantRecipe) -> int:
    """Return what the tables of one rate cost, scales included."""
    return VQLayout.uniform(2, 8, rate, codec=recipe.codec, window=recipe.window).codebook_bits()


def sharing_groups(plans: Mapping[str, MatrixPlan]) -> dict[str, Sequence[MatrixPlan]]:
    """Return the plans whose shared tables are trained together, by what these are named after.

    Tables that a trellis shares are not trained.
    """
    groups: dict[str, list[MatrixPlan]] = {}
    for matrix in plans.values():
        if matrix.shared and matrix.layout.codec == "lookup":
            groups.setdefault(matrix.label, []).append(matrix)
    return dict(groups)


def _unless_kept(
    shapes: Mapping[str, tuple[int, int]], recipe: QuantRecipe
) -> dict[str, tuple[int, int]]:
    """Leave out what `recipe.keep` names."""
    left = dict(shapes)
    for pattern in recipe.kept_patterns:
        found = [name for name in shapes if fnmatchcase(name, pattern)]
        if not found:
            there = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in shapes)
            raise ConfigError(
                f"keep holds {pattern!r}, which is no matrix of this model; there are "
                f"{', '.join(there)}"
            )
        for name in found:
            left.pop(name, None)
    if not left:
        raise ConfigError(f"keep = {recipe.keep!r} leaves no matrix to quantize")
    return left


def kind_of(name: str) -> str:
    """Return a module's name without layer numbers, fit for a table's name."""
    return re.sub(r"\.\d+(?=\.)", "", name).replace(".", "-")
