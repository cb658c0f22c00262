"""How much `solver.solve` has to do, counted from layouts alone (called by `stage_work`).

A function here counts the function of the same name in `solver`, `first_tables`, `codebook`,
`rounding`, `trellis_search`, `two_sided`, `ldl`, `ordering` or `gate`: whoever changes one changes
the other; `tests/quantizer/test_solver_work.py` runs both. Work is counted by kind, as kinds run at
speeds of their own (`machine_speed`): multiply-adds of products, of factorisations and of the
search; vectors and codes that are moved about; steps that cost a call each, whatever their size.
The search for a trellis has one multiply-add for every state at every weight.
Not here: models, data, seconds.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from mgvq_kernels.layout import Band, Stage, VQLayout
from mgvq_kernels.trellis import GROUP_WEIGHTS, segments
from mgvq_quantizer.block_codes import FINALISTS
from mgvq_quantizer.codebook import CODEBOOK_SIZE, SEED_VECTORS
from mgvq_quantizer.first_tables import MAX_TRAINING_VECTORS
from mgvq_quantizer.ordering import TRIAL_ROWS, quick
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.rounding import BUFFER, block_of
from mgvq_quantizer.trellis_search import CLOSING, SCALE_STEPS
from mgvq_quantizer.two_sided import ROWS

Work = Counter[str]
"""How many units of each kind."""

FORWARD = "forward"
"""Multiply-adds of the model's products and of moments, in float32."""
MATMUL = "matmul"
"""Multiply-adds of the solver's products, in float32."""
FACTOR = "factor"
"""Multiply-adds of products and factorisations in float64."""
SQUARE = "square"
"""Numbers of an `[I, I]` moment that is damped, factored and turned into feedback."""
SPREAD = "spread"
"""Multiply-adds of distances while the first codewords are drawn: a product with one vector."""
TRAIN = "train"
"""Vectors put into cells while a table is trained, besides the search."""
REFIT = "refit"
"""Codes decoded and scattered once, there and back."""
STEP = "step"
"""Choices of one block for all rows: what each costs before the first row."""
PAIRS = "pairs"
"""Pairs of entries, of a vector across a block and of one beside it, whose scores are added up."""
VISIT = "visit"
"""Numbers of a block that such a choice passes over, besides the search."""
FLOW = "flow"
"""Numbers that norms, activations and the like pass over in a forward of the model."""
STORE = "store"
"""Bytes that are written, with their digests."""

REFIT_STEPS = {1: 7, 2: 5, 3: 11, 4: 4, 8: 3}
"""Conjugate gradient steps of a refit by rate, till it has settled: most of those that were counted
on moments of uneven channels with a decaying spectrum, 256 and 768 wide. Moments of fewer tokens
than channels take up to all that a refit may."""
_TRELLIS_REFIT_STEPS = {8: 4, 9: 4, 10: 5, 11: 7, 12: 8}
"""The same of a trellis by window, counted on the same moments: alike at 1 to 4 bits."""
_TWO_SIDED_STEPS = 2.3
"""How many times as many a curvature of the outputs makes: 1.7 to 2.6 there."""
_MOST_STEPS = 25


def search(vector_dim: int) -> str:
    """Return the kind of the multiply-adds of a search among vectors of one length."""
    return f"search {vector_dim}"


def path(stage: Stage) -> str:
    """Return the kind of the multiply-adds of a search for a trellis's path."""
    return f"search of {stage.window} bits, {stage.rate} a weight"


def macs(work: Work) -> int:
    """Return the multiply-adds of some work; what is moved about has none."""
    products = (FORWARD, MATMUL, FACTOR, SPREAD)
    kinds = [kind for kind in work if kind in products or "search" in kind]
    return sum(work[kind] for kind in kinds)


def times(work: Work, count: int) -> Work:
    """Return the work of `count` like calls."""
    return Work({kind: n * count for kind, n in work.items()})


def total(parts: Sequence[Work]) -> Work:
    """Return the sum of some work."""
    whole = Work()
    for part in parts:
        whole.update(part)
    return whole


def solve(
    layouts: Sequence[VQLayout],
    recipe: QuantRecipe,
    is_fixed: bool = False,
    is_two_sided: bool = False,
    is_trial: bool = False,
) -> Work:
    """Count `solver.solve` of matrices that share tables.

    Args:
        layouts: one a problem.
        recipe: rounds and sweeps.
        is_fixed: whether the tables are given.
        is_two_sided: whether the problems bring a curvature of their outputs.
        is_trial: whether the error of the nearest codewords is left out.
    """
    work = Work()
    for layout in layouts:
        O, I = layout.out_features, layout.in_features  # noqa: E741
        square = O * I * I
        work.update(factorize(layout))
        measured = recipe.rounds - bool(recipe.drawn_out)  # all rounds but one that is drawn out
        work.update(times(form(layout, is_two_sided), 1 + measured))
        work.update(times(form(layout), 2))  # the error at the end, as a share
        if not is_trial:
            work.update(times(form(_plain_rows(layout)), 2))  # and that of plain codewords
            work.update(sweep(_plain_rows(layout), keeps_better=False))
        if layout.codec == "trellis":
            work[MATMUL] += SCALE_STEPS * O * I  # reaching_scales
        work.update(times(_assign(layout, recipe, is_two_sided), recipe.rounds))
        work[MATMUL] += recipe.rounds * square  # _refit_scales
        if is_two_sided:
            work.update(_row_feedback(layout))
            work[MATMUL] += recipe.rounds * 2 * O * O * I
            work[MATMUL] += recipe.rounds * O**3 // 3
        if not is_fixed:
            refit = refit_codebooks(layout, is_two_sided)
            work.update(times(refit, recipe.rounds))
    if not is_fixed:
        work.update(_first_books(layouts, recipe))
    return work


def channel_order(layout: VQLayout, recipe: QuantRecipe) -> Work:
    """Count `ordering.channel_order`: some rows rounded in both orders."""
    if not layout.has_permutation or max(map(block_of, layout.bands)) == 1:
        return Work()
    return times(solve([some_rows(layout)], quick(recipe), is_trial=True), 2)


def some_rows(layout: VQLayout) -> VQLayout:
    """Return the layout of `ordering.some_rows`."""
    step = max(1, layout.out_features // TRIAL_ROWS)
    return dataclasses.replace(layout, out_features=-(-layout.out_features // step))


def uniform(layout: VQLayout, rate: int, recipe: QuantRecipe) -> VQLayout:
    """Return the layout of one band for a matrix of the same shape, in the recipe's codec."""
    O, I = layout.out_features, layout.in_features  # noqa: E741
    return VQLayout.uniform(O, I, rate, True, recipe.codec, recipe.window)


def factorize(layout: VQLayout) -> Work:
    """Count `ldl.factorize` and both feedbacks."""
    I = layout.in_features  # noqa: E741
    return Work({FACTOR: I**3 // 6, SQUARE: I * I})


def form(layout: VQLayout, is_two_sided: bool = False) -> Work:
    """Count `two_sided.form`."""
    O, I = layout.out_features, layout.in_features  # noqa: E741
    return Work({MATMUL: O * I * I + (O * O * I if is_two_sided else 0)})


def refit_codebooks(layout: VQLayout, is_two_sided: bool = False) -> Work:
    """Count `codebook.refit_codebooks`: one image and one scatter more than steps."""
    passes = 1 + refit_steps(layout, is_two_sided)
    work = times(form(layout, is_two_sided), passes)
    work[REFIT] += passes * entries(layout)
    return work


def entries(layout: VQLayout) -> int:
    """Return how many entries of tables a matrix's codes name."""
    stages = [(band.width, stage) for band in layout.bands for stage in band.stages]
    return layout.out_features * sum(width // stage.vector_dim for width, stage in stages)


def refit_steps(layout: VQLayout, is_two_sided: bool = False) -> int:
    """Return how many steps a refit is expected to take; the slowest band decides."""
    if layout.codec == "trellis":
        return max(_TRELLIS_REFIT_STEPS[band.stages[0].window] for band in layout.bands)
    steps = max(REFIT_STEPS[band.rate] for band in layout.bands)
    return min(_MOST_STEPS, round(steps * _TWO_SIDED_STEPS)) if is_two_sided else steps


def train_codebook(vectors: int, blocks: int, vector_dim: int, iterations: int) -> Work:
    """Count `codebook.train_codebook`.

    Args:
        vectors: all of them.
        blocks: how many metrics they are measured in.
        vector_dim: d.
        iterations: rounds.
    """
    d = vector_dim
    drawn = min(vectors, SEED_VECTORS)
    work = times(nearest(vectors, blocks, d), iterations)
    work[MATMUL] += drawn * d * d + iterations * vectors * d * d
    work[FACTOR] += iterations * CODEBOOK_SIZE * blocks * d * d
    work[SPREAD] += CODEBOOK_SIZE * drawn * (d + d * d)
    work[TRAIN] += iterations * vectors
    return work


def nearest(vectors: int, blocks: int, vector_dim: int) -> Work:
    """Count `codebook.nearest`; `vectors` are those of all blocks."""
    d = vector_dim
    return Work({search(d): vectors * CODEBOOK_SIZE * d, MATMUL: blocks * CODEBOOK_SIZE * d * d})


def assign(rows: int, band: Band) -> Work:
    """Count `block_codes.assign` of one block of a band, or `trellis_search.assign_trellis`."""
    b = block_of(band)
    if band.stages[0].codec == "trellis":
        return Work({STEP: 1, VISIT: rows * b}) + encode(rows, band.stages[0])
    dims = [stage.vector_dim for stage in band.stages]
    work = Work({STEP: 1, VISIT: rows * b}) + nearest(rows, 1, b)
    for d in dims[:-1]:
        beside = b // d
        work.update(times(nearest(rows, 1, d), beside))
        work[PAIRS] += beside * rows * CODEBOOK_SIZE**2
        put_right = FINALISTS * rows + d  # for each of them; the table in the metric
        work[MATMUL] += beside * CODEBOOK_SIZE * (CODEBOOK_SIZE * d + put_right * b)
        work[MATMUL] += FINALISTS * rows * b * b  # forms
    return work


def encode(rows: int, stage: Stage) -> Work:
    """Count `trellis_search.encode`: every segment's stream, and twice as far as it takes to fix
    the state where it closes."""
    weights = [(end - start) * GROUP_WEIGHTS for start, end in segments(rows)]
    searched = sum(n + 2 * min(n, CLOSING) for n in weights)
    return Work({path(stage): searched * stage.codebook_size})


def sweep(layout: VQLayout, keeps_better: bool) -> Work:
    """Count `rounding.sweep`."""
    O, I = layout.out_features, layout.in_features  # noqa: E741
    work = Work({MATMUL: O * I * I})
    for band in layout.bands:
        b = block_of(band)
        blocks, at_once = band.width // b, max(1, BUFFER // b)
        whole, rest = divmod(blocks, at_once)
        pairs = whole * _pairs(at_once) + _pairs(rest)
        work.update(times(assign(O, band), blocks))
        work[MATMUL] += O * b * b * (pairs + blocks * (2 if keeps_better else 1))
    return work


def _pairs(count: int) -> int:
    return count * (count - 1) // 2


def _assign(layout: VQLayout, recipe: QuantRecipe, is_two_sided: bool) -> Work:
    O, I = layout.out_features, layout.in_features  # noqa: E741
    work = times(form(layout), 1)
    if not is_two_sided:
        work.update(sweep(layout, keeps_better=False))
        work.update(times(sweep(layout, keeps_better=True), recipe.descent_sweeps))
        return work
    parts = [dataclasses.replace(layout, out_features=rows) for rows in _row_blocks(O)]
    work.update(total([sweep(part, keeps_better=False) for part in parts]))
    work[MATMUL] += O * O * I // 2 + O * O * I  # what blocks carry, and the shaped error
    descent = total([sweep(part, keeps_better=True) for part in parts])
    descent[MATMUL] += O * O * I + 2 * O * I * I
    work.update(times(descent, recipe.descent_sweeps))
    return work


def _row_blocks(rows: int) -> list[int]:
    whole, rest = divmod(rows, ROWS)
    return [ROWS] * whole + [rest] * (rest > 0)


def _row_feedback(layout: VQLayout) -> Work:
    return Work({FACTOR: layout.out_features**3 // 6, SQUARE: layout.out_features**2})


def _plain_rows(layout: VQLayout) -> VQLayout:
    """The rows that `solver._plain_error` rounds: all, or a trellis's first segment."""
    if layout.codec == "trellis":
        return dataclasses.replace(layout, out_features=segments(layout.out_features)[0][1])
    return layout


def _first_books(layouts: Sequence[VQLayout], recipe: QuantRecipe) -> Work:
    """Tables are told apart by the stages of their band, as a matrix has one band a rate; those of
    a trellis are drawn, not trained, once their tails are known."""
    if layouts[0].codec == "trellis":
        return Work({MATMUL: 2 * sum(layout.num_weights for layout in layouts)})
    widths: Counter[tuple[int, ...]] = Counter()
    for layout in layouts:
        for band in layout.bands:
            widths[tuple(stage.vector_dim for stage in band.stages)] += band.width
    work = Work()
    for dims, width in widths.items():
        work.update(first_tables(layouts[0].out_features, width, dims, recipe))
    return work


def first_tables(rows: int, width: int, dims: Sequence[int], recipe: QuantRecipe) -> Work:
    """Count `first_tables.first_tables` of lookups."""
    rows = min(rows, max(1, MAX_TRAINING_VECTORS // (width // min(dims))))
    work = Work()
    for d in dims:
        blocks = width // d
        work.update(train_codebook(rows * blocks, blocks, d, recipe.codebook_iterations))
        work.update(nearest(rows * blocks, blocks, d))
    return work
