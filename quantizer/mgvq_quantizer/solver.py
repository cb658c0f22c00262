"""Weight matrices in; codes, tables and row scales out (called by `stream`, `sensitivity`).

The inputs are permuted and cut into bands, each with stages; every stage reads one named table, and
tables of one name are one table, in one matrix or in several. The feedback of rounding runs through
all bands. Rows are divided by their scales (root mean square at first); then rounding, coordinate
descent, least-squares refit of the tables and of the scales take turns and the best state is kept.
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
    assign,
    decode,
    named,
    nearest,
    refit_codebooks,
    snap,
    train_codebook,
    vectors_of,
)
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
from mgvq_quantizer.trellis_search import (
    assign_trellis,
    first_table,
    reaching_scales,
    tail_of,
    trellis_rates,
)
from mgvq_quantizer.two_sided import RowFeedback, descend_rows, form, round_rows, row_feedback

MAX_TRAINING_VECTORS = 1 << 17
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
    """A problem in permuted channels, and the best answer so far."""

    layout: VQLayout
    names: Names
    weight: Tensor
    hessian: Tensor
    to_energy: float
    rounding: Feedback
    descent: Feedback
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
        books: tables that are already fixed, all of them; codes and row scales adapt to them.
        is_trial: leave out `error_nearest`, which takes a rounding; it is nan then.

    Returns:
        One solution a problem, in order.

    Raises:
        ArithmeticError: if a second moment cannot be factored.
    """
    members = [_member(problem, recipe) for problem in problems]
    fixed = books is not None
    if books is None:
        books = _first_books(members, recipe, generator)
    for m in members:
        search = m.rounding.metrics, _values(m, books), trellis_rates(m.layout)
        m.scales = reaching_scales(m.weight, m.scales, *search)
    nearest_errors = [float("nan") if is_trial else _plain_error(m, books) for m in members]
    best_loss = float("inf")
    best: tuple[Books, list[Tensor], list[Rounded]] | None = None
    for _ in range(recipe.rounds):
        for member in members:
            _assign(member, books, recipe.descent_sweeps)
        if not fixed:
            books = _refit_books(members, books)
        for member in members:
            _refit_scales(member)
        loss = sum(_loss(member) for member in members)
        if loss < best_loss:
            best_loss = loss
            best = (books, [m.scales for m in members], [m.rounded.copy() for m in members])
    assert best is not None
    solutions, found = [], zip(problems, members, *best[1:], nearest_errors, strict=True)
    for problem, member, scales, rounded, first in found:
        # A row of zeros is stored as one: the smallest scale times a codeword is not zero.
        scales = scales * member.weight.any(1)
        member.scales, member.rounded = scales, rounded
        weight = _to_weight(problem, rounded, best[0], scales)
        solutions.append(Solution(weight, first, _error(member, rounded.value)))
    return solutions


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
        scales=scales,
        rounded=empty(weight, [], []),
        kept=kept_shares(problem.layout, recipe.drawn_out),
        rows=rows,
    )


def _first_books(
    members: Sequence[_Member], recipe: QuantRecipe, generator: torch.Generator
) -> dict[str, Codebook]:
    """Train every table on all bands that read it."""
    pieces: dict[tuple[str, ...], list[_Piece]] = {}
    for member in members:
        for b, names in enumerate(member.names):
            pieces.setdefault(tuple(names), []).append(_Piece(member, b))
    books: dict[str, Codebook] = {}
    for names, parts in pieces.items():
        books |= zip(names, _band_books(parts, recipe, generator), strict=True)
    return books


@dataclass(frozen=True, eq=False)
class _Piece:
    """One band of one member."""

    member: _Member
    band: int

    @property
    def columns(self) -> slice:
        band = self.member.layout.bands[self.band]
        return slice(band.start, band.start + band.width)


def _band_books(
    pieces: Sequence[_Piece], recipe: QuantRecipe, generator: torch.Generator
) -> list[Codebook]:
    """Train one table a stage on a sample of rows; later stages on what the earlier ones left."""
    member, band = pieces[0].member, pieces[0].band
    O, stages = member.layout.out_features, member.layout.bands[band].stages  # noqa: E741
    stage, kept = stages[0], member.kept[band]
    if stage.codec == "trellis":
        parts = [piece.member.target()[:, piece.columns] for piece in pieces]
        moments = [piece.member.hessian.diagonal()[piece.columns] for piece in pieces]
        tail = tail_of(torch.cat(parts, dim=1), torch.cat(moments))
        return [first_table(stage.rate, stage.window, tail, generator).drawn_out(1 / kept)]
    dims = [stage.vector_dim for stage in stages]
    widths = [piece.columns.stop - piece.columns.start for piece in pieces]
    some = max(1, MAX_TRAINING_VECTORS * min(dims) // sum(widths))
    rows = torch.randperm(O, generator=generator)[:some]
    left = [p.member.target()[rows.to(p.member.weight.device), p.columns] for p in pieces]
    books: list[Codebook] = []
    for d in dims:
        metrics = torch.cat(
            [_metrics(p.member, p.band, d) * (p.member.to_energy * O) for p in pieces]
        )
        vectors = torch.cat([vectors_of(part, d) for part in left])
        book = train_codebook(vectors, metrics, recipe.codebook_iterations, generator)
        codes = nearest(vectors, book.values, metrics)
        values = torch.split(book.values[codes], [width // d for width in widths])
        left = [
            part - v.transpose(0, 1).reshape(part.shape)
            for part, v in zip(left, values, strict=True)
        ]
        books.append(book)
    return [book.drawn_out(1 / kept) for book in books]


def _assign(member: _Member, books: Books, descent_sweeps: int) -> None:
    """Round from scratch, check the loss identity, then descend."""
    target, tables, rows = member.target(), _values(member, books), member.rows
    rates, kept = trellis_rates(member.layout), member.kept
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
    if abs(residual - loss) > _IDENTITY_TOLERANCE * max(loss, floor):
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
    new: dict[str, Codebook] = {}
    for member in members:
        for names, kept in zip(member.names, member.kept, strict=True):
            new |= {name: snap(refitted[name]).drawn_out(1 / kept) for name in names}
    for member in members:
        member.rounded.value = decode(member.rounded.codes, _values(member, new))
    return new


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
    """The objective over the divided rows, as a share of the rows' own energy."""
    error = member.target() - member.rounded.value
    return form(error, member.hessian, member.outputs) * member.to_energy


def _error(member: _Member, value: Tensor) -> float:
    """`tr(E A E^T) / tr(W A W^T)` with the true rows, the first ones if `value` has no more."""
    W = member.weight[: len(value)]
    error = W - member.scales[: len(value), None] * value
    return form(error, member.hessian, None) / max(form(W, member.hessian, None), 1e-30)


def _plain_error(member: _Member, books: Books) -> float:
    """The error of the nearest codewords, block by block, without any metric or feedback."""
    target, values = member.target(), []
    rates = trellis_rates(member.layout)
    if any(rates):
        target = target[: segments(len(target))[0][1]]
    parts = torch.split(target, [band.width for band in member.layout.bands], dim=1)
    for columns, tables, run, rate in zip(
        parts, _values(member, books), blocks_of(member.layout), rates, strict=True
    ):
        eye = torch.eye(run.block, device=target.device)
        if rate:
            blocks = torch.split(columns, run.block, dim=1)
            values += [assign_trellis(block, eye, tables, rate)[1] for block in blocks]
        else:
            _, value = assign(columns.reshape(-1, run.block), eye, tables)
            values.append(value.view(len(target), -1))
    return _error(member, torch.cat(values, dim=1))


def _metrics(member: _Member, band: int, d: int) -> Tensor:
    """`[width/d, d, d]`: the diagonal blocks of a band's rounding metrics."""
    metrics = member.rounding.metrics[band]
    nb, b, _ = metrics.shape
    blocks = metrics.view(nb, b // d, d, b // d, d)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, d, d)


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
