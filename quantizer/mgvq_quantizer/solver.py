"""Weight matrices in; codes, tables and row scales out (called by `stream`, `sensitivity`).

The inputs are permuted and cut into bands, each with stages; every stage reads one named table, and
tables of one name are one table, in one matrix or in several. The feedback of rounding runs through
all bands. Rows are divided by their scales (root mean square at first); then rounding, coordinate
descent, least-squares refit of the tables and of the scales take turns and the best state is kept.
Where tables are drawn out (`rounding.kept_shares`) the last round is, from the best state before
it: a round in which they are loses more, whatever it is worth.
The objective is `tr(E A E^T)` over the divided rows: equal relative error for every output; or
`tr(B E A E^T)` where a problem brings a curvature `B` of its outputs (`two_sided`).
Not here: where `A`, the second moment, and `B` come from, the order of channels (`ordering`),
files, models.

Source: method memo D.1-D.3, D.6, C.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_kernels.trellis import pack_windows, segments
from mgvq_quantizer.codebook import (
    Codebook,
    Names,
    Tables,
    decode,
    named,
    refit_codebooks,
    snap,
)
from mgvq_quantizer.first_tables import Piece, first_tables
from mgvq_quantizer.ldl import factorize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.rounding import (
    Feedback,
    Rounded,
    blocks_of,
    descent_feedback,
    empty,
    kept_shares,
    ldl_feedback,
    sweep,
)
from mgvq_quantizer.trellis_search import reaching_scales, trellis_rates
from mgvq_quantizer.two_sided import RowFeedback, descend_rows, form, round_rows, row_feedback

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16: rows below it are stored as codes of (almost) zero."""
_IDENTITY_TOLERANCE = 1e-3

Books = Mapping[str, Codebook]
"""Tables by name."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A matrix to quantize and the second moment of its inputs."""

    weight: Tensor
    """`[O, I]` float32, channels in the model's order."""
    hessian: Tensor
    """`[I, I]` float64: the mean of `x x^T` over tokens."""
    permutation: Tensor | None
    """`[I]` int64: the original channel at each permuted place."""
    layout: VQLayout
    tables: Names = ()
    """[band][stage]: names; empty stands for one table a band and stage, named by its place."""
    output_factor: Tensor | None = None
    """`[O, O]` float64: what the end loss says about errors of its outputs, of any scale."""

    def moved(self, shift: Tensor) -> Problem:
        """Return the same with a shift `[O, I]` added to the weight."""
        return replace(self, weight=self.weight + shift.to(self.weight))

    @property
    def names(self) -> Names:
        """[band][stage]: the tables its codes point into."""
        return self.tables or tuple(
            tuple(f"{b}.{s}" for s in range(len(band.stages)))
            for b, band in enumerate(self.layout.bands)
        )


@dataclass(frozen=True, eq=False)
class Solution:
    """A quantized matrix and how well it stands in for the original."""

    weight: VQWeight
    error_nearest: float
    """`tr(E A E^T) / tr(W A W^T)` of nearest codewords (a trellis: of the first segment)."""
    error: float
    """The same of what is stored."""
    bias: Tensor | None = None
    """`[O]` float32, every value a float16: the bias that goes with it, where that changed."""
    tails: tuple[int, ...] = ()
    """[band]: of `allocation.MatrixPlan`."""


@dataclass(eq=False)
class _Member:
    """A problem in permuted channels, and its answer as it stands."""

    layout: VQLayout
    names: Names
    weight: Tensor
    hessian: Tensor
    to_energy: float
    rounding: Feedback
    descent: Feedback
    unit: Tensor
    """`[O]` float32: the first scales, in which losses of all rounds are measured."""
    scales: Tensor
    """`[O]` float32, every value a float16."""
    rounded: Rounded
    kept: Sequence[float]
    rows: RowFeedback | None
    """Between the divided rows."""

    @property
    def outputs(self) -> Tensor | None:
        """`[O, O]`: the curvature `B` of the divided rows, None for the identity."""
        return None if self.rows is None else self.rows.matrix

    def target(self) -> Tensor:
        """`[O, I]`: rows divided by their scales."""
        return self.weight / self.scales[:, None]


def solve(
    problems: Sequence[Problem],
    recipe: QuantRecipe,
    generator: torch.Generator,
    books: Books | None = None,
    is_trial: bool = False,
) -> list[Solution]:
    """Quantize matrices together; tables of one name are shared between them.

    Args:
        problems: at least one.
        recipe: rounds, sweeps and damping.
        generator: seeds the tables.
        books: tables that are already fixed, all of them, drawn out as far as the recipe says;
            codes and row scales adapt to them.
        is_trial: leave out `error_nearest`, which takes a rounding; it is nan then.

    Returns:
        One solution a problem, in order.

    Raises:
        ArithmeticError: if a second moment cannot be factored.
    """
    members = [_member(problem, recipe) for problem in problems]
    given, is_fixed = books, books is not None
    if given is None:
        books = _first_books(members, recipe, generator)
    else:
        books = _drawn(members, given, -1)
    for m in members:
        search = m.rounding.metrics, _values(m, books), trellis_rates(m.layout)
        m.scales = reaching_scales(m.weight, m.scales, *search)
    nearest_errors = [float("nan") if is_trial else _plain_error(m, books) for m in members]
    books = _best_round(members, books, recipe, is_fixed)
    if recipe.drawn_out:
        books = given or _drawn(members, books, 1)
        books = _round(members, books, recipe, is_fixed, is_drawn=True)
    solutions = []
    for problem, m, first in zip(problems, members, nearest_errors, strict=True):
        # A row of zeros is stored as one: the smallest scale times a codeword is not zero.
        m.scales = m.scales * m.weight.any(1)
        weight = _to_weight(problem, m.rounded, books, m.scales)
        solutions.append(Solution(weight, first, _error(m, m.rounded.value)))
    return solutions


def _best_round(
    members: Sequence[_Member], books: Books, recipe: QuantRecipe, is_fixed: bool
) -> Books:
    """Give the members the state of the round that lost least, of all but one that is drawn out;
    return its tables. If that one is the only round: the first tables, and no codes yet."""
    best_loss = float("inf")
    best = books, [m.scales for m in members], [m.rounded for m in members]
    for _ in range(recipe.rounds - bool(recipe.drawn_out)):
        books = _round(members, books, recipe, is_fixed)
        loss = sum(map(_loss, members))
        if loss < best_loss:
            best_loss = loss
            best = books, [m.scales for m in members], [m.rounded for m in members]
    for m, scales, rounded in zip(members, *best[1:], strict=True):
        m.scales, m.rounded = scales, rounded
    return best[0]


def _round(
    members: Sequence[_Member],
    books: Books,
    recipe: QuantRecipe,
    is_fixed: bool,
    is_drawn: bool = False,
) -> Books:
    """Give the members codes, tables unless they are fixed, and scales; return the tables."""
    for m in members:
        _assign(m, books, recipe.descent_sweeps, m.kept if is_drawn else ())
    if not is_fixed:
        books = _refit_books(members, books)
        if is_drawn:
            books = _drawn(members, books, 1)
        for m in members:
            m.rounded.value = decode(m.rounded.codes, _values(m, books))
    for m in members:
        _refit_scales(m)
    return books


def _drawn(members: Sequence[_Member], books: Books, way: int) -> dict[str, Codebook]:
    """Return the members' tables drawn out by what their codes keep, or in again (`way` -1)."""
    return {
        name: books[name].drawn_out(kept**-way)
        for m in members
        for names, kept in zip(m.names, m.kept, strict=True)
        for name in names
    }


def _member(problem: Problem, recipe: QuantRecipe) -> _Member:
    weight, hessian = problem.weight.float(), problem.hessian.double()
    if problem.permutation is not None:
        weight = weight[:, problem.permutation]
        hessian = hessian[problem.permutation][:, problem.permutation]
    factors = factorize(hessian, blocks_of(problem.layout), recipe.damping)
    scales = weight.square().mean(1).sqrt().clamp_min(SMALLEST_SCALE).half().float()  # [O]
    normal = weight / scales[:, None]
    rows = None
    if problem.output_factor is not None:
        rows = row_feedback(scales[:, None].double() * problem.output_factor * scales)
    energy = form(normal, factors.matrix.float(), None if rows is None else rows.matrix)
    return _Member(
        layout=problem.layout,
        names=problem.names,
        weight=weight,
        hessian=factors.matrix.float(),
        to_energy=1.0 / max(energy, 1e-30),
        rounding=ldl_feedback(factors),
        descent=descent_feedback(factors),
        unit=scales,
        scales=scales,
        rounded=empty(weight, [], []),
        kept=kept_shares(problem.layout, recipe.drawn_out),
        rows=rows,
    )


def _first_books(
    members: Sequence[_Member], recipe: QuantRecipe, generator: torch.Generator
) -> dict[str, Codebook]:
    """Train every table on all bands that read it."""
    pieces: dict[tuple[str, ...], list[Piece]] = {}
    for m in members:
        target, moments = m.target(), m.hessian.diagonal()
        parts = zip(m.names, m.layout.bands, m.rounding.metrics, strict=True)
        for names, band, metrics in parts:
            here = slice(band.start, band.start + band.width)
            importance = m.to_energy * len(target)
            piece = Piece(band.stages, target[:, here], moments[here], metrics, importance)
            pieces.setdefault(tuple(names), []).append(piece)
    books: dict[str, Codebook] = {}
    for names, mine in pieces.items():
        books |= zip(names, first_tables(mine, recipe, generator), strict=True)
    return books


def _assign(member: _Member, books: Books, descent_sweeps: int, kept: Sequence[float] = ()) -> None:
    """Round from scratch, check the loss identity, then descend; `kept` if tables are drawn out."""
    target, tables, rows = member.target(), _values(member, books), member.rows
    rates = trellis_rates(member.layout)
    rounded = empty(target, tables, [band.width for band in member.layout.bands])
    member.rounded = rounded
    if rows is None:
        residual = sweep(target, rounded, tables, member.rounding, rates=rates, kept=kept)
        shaped = target - rounded.value
    else:
        residual = round_rows(target, rounded, tables, member.rounding, rows, kept)
        shaped = rows.lower.T @ (target - rounded.value)
    loss = form(shaped, member.hessian, None)
    floor = 1e-6 / member.to_energy
    if not abs(residual - loss) <= _IDENTITY_TOLERANCE * max(loss, floor):  # NaN is neither
        raise ArithmeticError(
            f"the residuals of rounding sum to {residual:.6g} but the loss is {loss:.6g}: the "
            "factorisation lost its precision; raise the damping"
        )
    for _ in range(descent_sweeps):
        if rows is None:
            sweep(target, rounded, tables, member.descent, keep_better=True, rates=rates)
        else:
            descend_rows(target, rounded, tables, member.descent, rows, member.hessian)


def _refit_books(members: Sequence[_Member], books: Books) -> dict[str, Codebook]:
    refitted = refit_codebooks(
        [member.target() for member in members],
        [member.hessian * member.to_energy for member in members],
        [member.rounded.codes for member in members],
        [member.names for member in members],
        {name: book.values for name, book in books.items()},
        outputs=[member.outputs for member in members],
    )
    return {name: snap(values) for name, values in refitted.items()}


def _refit_scales(member: _Member) -> None:
    """Give the rows the factors that minimise the loss; rounded to float16."""
    target, value = member.target(), member.rounded.value
    image = value @ member.hessian  # [O, I]
    if member.outputs is None:
        factor = (target * image).sum(1) / (value * image).sum(1).clamp_min(1e-30)  # [O]
    else:
        normal = member.outputs * (image @ value.T)  # [O, O]
        normal.diagonal().clamp_min_(1e-30)
        factor = torch.linalg.solve(normal, (member.outputs @ target * image).sum(1))
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    member.scales = (member.scales * factor).clamp_min(SMALLEST_SCALE).half().float()


def _loss(member: _Member) -> float:
    """The objective in the first scales, as a share of the rows' own energy."""
    error = (member.weight - member.scales[:, None] * member.rounded.value) / member.unit[:, None]
    return form(error, member.hessian, member.outputs) * member.to_energy


def _error(member: _Member, value: Tensor) -> float:
    """`tr(E A E^T) / tr(W A W^T)` with the true rows, the first ones if `value` has no more."""
    W = member.weight[: len(value)]
    error = W - member.scales[: len(value), None] * value
    return form(error, member.hessian, None) / max(form(W, member.hessian, None), 1e-30)


def _plain_error(member: _Member, books: Books) -> float:
    """The error of the nearest codewords, block by block, without any metric or feedback."""
    target, tables = member.target(), _values(member, books)
    rates = trellis_rates(member.layout)
    if any(rates):
        target = target[: segments(len(target))[0][1]]
    rounded = empty(target, tables, [band.width for band in member.layout.bands])
    runs = blocks_of(member.layout)
    eyes = [torch.eye(r.block).to(target).expand(r.width // r.block, -1, -1) for r in runs]
    nothing = torch.zeros(()).to(target).expand_as(member.rounding.coupling)  # takes no memory
    sweep(target, rounded, tables, Feedback(nothing, tuple(eyes)), rates=rates)
    return _error(member, rounded.value)


def _values(member: _Member, books: Books) -> Tables:
    return [[book.values for book in band] for band in named(member.names, books)]


def _to_weight(problem: Problem, rounded: Rounded, books: Books, scales: Tensor) -> VQWeight:
    device, permutation = scales.device, problem.permutation
    mine = named(problem.names, books)
    return VQWeight(
        layout=problem.layout,
        codes=tuple(
            tuple(pack_windows(code, rate) if rate else code.to(torch.uint8) for code in band)
            for band, rate in zip(rounded.codes, trellis_rates(problem.layout), strict=True)
        ),
        codebooks=tuple(tuple(book.entries for book in band) for band in mine),
        codebook_scales=tuple(
            tuple(torch.tensor(book.scale, device=device) for book in band) for band in mine
        ),
        scales=scales.half(),
        permutation=None if permutation is None else permutation.to(torch.int32),
    )
