# mypy: disable-error-code="untyped-decorator"
"""Codes chosen in compiled code (called by `codebook.nearest` and `rounding.sweep` with numba).

The nearest codewords of vectors, and the blocks of a buffer of columns one after the other, with
the feedback between them. Sums keep their order and are not contracted: of a function that several
others call, a process keeps one copy, and copies would round differently. Rows, or vectors, are cut
over as many threads as torch may use; what comes out does not depend on their number. Not here:
what is searched for, the couplings, and the plain torch code that these must agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numba import float32, int32, njit  # noqa: TID253 (this file is made of it)
from torch import Tensor

from mgvq_kernels.cpu_jit import compile_cached, lesser
from mgvq_kernels.cpu_threads import over_threads
from mgvq_quantizer.block_codes import without_couplings

_TILE_ROWS = 32
"""Rows whose codes of one block are chosen before those of the next block: for as long the tables
in the block's metric, 3 to 14 KB, stay in the first cache."""
_CROSSED_ROWS = 256
"""The same where a block has several vectors: sums of scores (`_cross`), 512 KB for three of them,
are made anew for each tile."""
_MANY_SEARCHES = 1 << 10
"""Searches (about 0.15 us each) from which on another thread pays."""


def nearest(vectors: Tensor, projected: Tensor, norms: Tensor) -> Tensor:
    """Return the code of the smallest `norms - 2 v . projected`, the lowest among equals.

    On one AVX2 core 77 ns a vector of one number, 81 of two, 107 of four, 159 of eight; in an
    earlier run torch's product and argmin took 1407, 1271, 1434, 519.

    Args:
        vectors: `[B, N, d]` float32, finite.
        projected: `[B, K, d]` float32: codewords times the block's metric.
        norms: `[B, K]` float32: the codewords' forms in the metric.

    Returns:
        `[B, N]` int64.
    """
    B, N, _ = vectors.shape
    codes = torch.empty((B, N), dtype=torch.int64)
    arrays = (
        vectors.contiguous().numpy(),
        (2 * projected.transpose(1, 2)).contiguous().numpy(),
        norms.contiguous().numpy(),
        codes.numpy(),
    )
    over_threads(lambda i, j: _search(*arrays, i, j), 0, N, 1, B * N >= _MANY_SEARCHES)
    return codes


class Buffer(Protocol):
    """Columns of a matrix, `[O, w]` float32 each."""

    weight: Tensor
    goal: Tensor
    value: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class Stages:
    """The tables of a band, and what every search in every block of it needs."""

    _vectors: Any
    """`[V, 3]` int64, stage after stage: first column, length, start of its table in `_tables`."""
    _tables: Any
    """`[sum 256 d]` float32."""
    _metrics: Any
    """`[nb, b, b]` float32."""
    _projected: tuple[Any, ...]
    """A vector: `[nb, b, 256]` float32: twice the codewords times the metric; without couplings for
    one across others."""
    _norms: Any
    """`[V, nb, 256]` float32: the codewords' forms."""

    @classmethod
    def of_band(cls, tables: Sequence[Tensor], metrics: Tensor) -> Stages:
        """Prepare a band.

        Args:
            tables: one `[256, d]` float32 a stage, of two stages the second across the block.
            metrics: `[nb, b, b]` float32, symmetric positive definite.
        """
        nb, b, _ = metrics.shape
        starts = np.cumsum([0, *(table.numel() for table in tables)])
        vectors: list[tuple[int, int, int]] = []
        projected, norms = [], []
        for table, start in zip(tables, starts[:-1], strict=True):
            d = table.shape[1]
            for first in range(0, b, d):
                here = slice(first, first + d)
                seen = metrics if d < b else without_couplings(metrics, tables[0].shape[1])
                image = seen[:, :, here] @ table.T  # [nb, b, 256]
                projected.append((2 * image).contiguous().numpy())
                norms.append((image[:, here] * table.T).sum(1))
                vectors.append((first, d, int(start)))
        return cls(
            np.array(vectors, dtype=np.int64),
            torch.cat([table.reshape(-1) for table in tables]).numpy(),
            metrics.contiguous().numpy(),
            tuple(projected),
            torch.stack(norms).numpy(),
        )

    def choose(
        self,
        first: int,
        buffer: Buffer,
        inner: Tensor,
        codes: Tensor,
        finalists: int,
        kept: float,
        *,
        keep_better: bool,
    ) -> Tensor:
        """Choose the codes of some blocks of the band, the last block first.

        Args:
            first: the band's block that the columns begin with.
            buffer: the columns; `goal`, `value` and `error` are overwritten.
            inner: `[w, w]` float32: how much of a block's new error the ones before it absorb.
            codes: `[O, w/b, V]` int64; overwritten.
            finalists: as in `block_codes`.
            kept: what goals are divided by before codewords are looked for.
            keep_better: keep old codes where the new ones are no better.

        Returns:
            `[O]` float64: the forms that were left, a row.
        """
        O = len(codes)  # noqa: E741
        forms = torch.empty(O, dtype=torch.float64)
        columns = (buffer.weight, buffer.goal, buffer.value, buffer.error, codes, forms)
        arrays = tuple(tensor.numpy() for tensor in columns)
        matrix = inner.contiguous().numpy()

        def run(start: int, stop: int) -> None:
            settings = first, finalists, keep_better, np.float32(kept)
            _choose(start, stop, settings, arrays, matrix, self._band)

        over_threads(run, 0, O, 1, codes.numel() >= _MANY_SEARCHES)
        return forms

    @property
    def _band(self) -> tuple[Any, ...]:
        return (
            self._vectors,
            self._tables,
            self._metrics,
            self._projected,
            self._norms,
        )


@njit
def _score(v, projected, norms, scores):  # type: ignore[no-untyped-def]
    """Write `norms - v . projected`; a loop a length, so that sums stay in registers."""
    K = norms.size
    if v.size == 1:
        for k in range(K):
            scores[k] = norms[k] - v[0] * projected[0, k]
    elif v.size == 2:
        for k in range(K):
            scores[k] = norms[k] - (v[0] * projected[0, k] + v[1] * projected[1, k])
    elif v.size == 4:
        a, b, c, d = v[0], v[1], v[2], v[3]
        for k in range(K):
            scores[k] = norms[k] - (
                a * projected[0, k]
                + b * projected[1, k]
                + c * projected[2, k]
                + d * projected[3, k]
            )
    else:
        for k in range(K):
            scores[k] = norms[k]
        for j in range(0, v.size, 4):
            a, b, c, d = v[j], v[j + 1], v[j + 2], v[j + 3]
            for k in range(K):
                scores[k] -= (
                    a * projected[j, k]
                    + b * projected[j + 1, k]
                    + c * projected[j + 2, k]
                    + d * projected[j + 3, k]
                )


@njit
def _least(scores):  # type: ignore[no-untyped-def]
    """Return the smallest score."""
    low = scores[0]
    for k in range(scores.size):
        low = lesser(low, scores[k])
    return low


@njit
def _first_of(low, scores):  # type: ignore[no-untyped-def]
    """Return where a score stands first."""
    last = int32(scores.size - 1)
    code = last
    for k in range(scores.size):
        code = min(code, int32(k) if scores[k] == low else last)
    return code


@compile_cached
def _search(vectors, projected, norms, codes, start, stop):  # type: ignore[no-untyped-def]
    scores = np.empty(norms.shape[1], np.float32)
    for b in range(vectors.shape[0]):
        for i in range(start, stop):
            _score(vectors[b, i], projected[b], norms[b], scores)
            codes[b, i] = _first_of(_least(scores), scores)


@njit
def _form(goal, value, metric):  # type: ignore[no-untyped-def]
    total = float32(0.0)
    for i in range(goal.size):
        image = float32(0.0)
        for j in range(goal.size):
            image += metric[i, j] * (goal[j] - value[j])
        total += image * (goal[i] - value[i])
    return total


@njit
def _cross(crossed, block, band):  # type: ignore[no-untyped-def]
    """Fill `[V - 1, 256, 256]`: what an entry of the vector across a block costs beside each of the
    others."""
    vectors, tables, metrics, _, _ = band
    across, b = vectors[len(vectors) - 1, 2], metrics.shape[1]
    image = np.empty(b, np.float32)
    for v in range(len(crossed)):
        begin, d, table = vectors[v]
        for entry in range(crossed.shape[1]):
            image[:] = 0.0
            for j in range(begin, begin + d):
                number = float32(2.0) * tables[across + entry * b + j]
                for i in range(d):
                    image[i] += number * metrics[block, begin + i, j]
            for k in range(crossed.shape[2]):
                cost = float32(0.0)
                for i in range(d):
                    cost += image[i] * tables[table + k * d + i]
                crossed[v, entry, k] = cost


@njit
def _decode(picked, new, band):  # type: ignore[no-untyped-def]
    """Write the value of a block's codes."""
    vectors, tables = band[:2]
    new[:] = 0.0
    for v in range(len(vectors)):
        begin, d, table = vectors[v]
        for i in range(d):
            new[begin + i] += tables[table + picked[v] * d + i]


@njit
def _least_sum(scores, more):  # type: ignore[no-untyped-def]
    """Return the smallest sum of two scores."""
    low = scores[0] + more[0]
    for k in range(scores.size):
        low = lesser(low, scores[k] + more[k])
    return low


@njit
def _finalists(scores, crossed, entries, costs):  # type: ignore[no-untyped-def]
    """Write the entries of the vector across that cost least with the best of the others."""
    last = len(crossed)
    costs[:], entries[:] = np.inf, 0  # the first one, too, where no cost is a number
    for entry in range(scores.shape[1]):
        cost = scores[last, entry]
        for v in range(last):
            cost += _least_sum(scores[v], crossed[v, entry])
        place = costs.size
        while place > 0 and cost < costs[place - 1]:
            place -= 1
            if place + 1 < costs.size:
                costs[place + 1], entries[place + 1] = costs[place], entries[place]
        if place < costs.size:
            costs[place], entries[place] = cost, entry


@njit
def _complete(entry, goal, picked, work, crossed, block, band):  # type: ignore[no-untyped-def]
    """Choose the codes beside an entry across: each alone, then each beside the others."""
    vectors, tables, _, projected, norms = band
    scores, sums, left = work[:3]
    last, b = len(crossed), goal.size
    picked[last] = entry
    for v in range(last):
        for k in range(sums.size):
            sums[k] = scores[v, k] + crossed[v, entry, k]
        picked[v] = _first_of(_least(sums), sums)
    _decode(picked, left, band)
    for i in range(b):
        left[i] = goal[i] - left[i]
    for v in range(last):
        begin, d, table = vectors[v]
        for i in range(d):
            left[begin + i] += tables[table + picked[v] * d + i]
        _score(left, projected[v][block], norms[v, block], sums)
        picked[v] = _first_of(_least(sums), sums)
        for i in range(d):
            left[begin + i] -= tables[table + picked[v] * d + i]


@njit
def _encode(goal, picked, new, work, crossed, block, band):  # type: ignore[no-untyped-def]
    """Choose the codes `picked` of one row's block as `block_codes.assign` does, and its value
    `new`."""
    vectors, _, metrics, projected, norms = band
    scores, sums, _, tried, entries, costs = work
    last = len(crossed)
    if last == 0:
        _score(goal, projected[0][block], norms[0, block], sums)
        picked[0] = _first_of(_least(sums), sums)
        _decode(picked, new, band)
        return
    for v in range(last + 1):
        here = slice(vectors[v, 0], vectors[v, 0] + vectors[v, 1])
        _score(goal[here], projected[v][block, here], norms[v, block], scores[v])
    _finalists(scores, crossed, entries, costs)
    least, picked[:] = float32(np.inf), 0
    for entry in entries:
        _complete(entry, goal, tried, work, crossed, block, band)
        _decode(tried, new, band)
        form = _form(goal, new, metrics[block])
        if form < least:
            least = form
            picked[:] = tried
    _decode(picked, new, band)


@compile_cached
def _choose(start, stop, settings, columns, inner, band):  # type: ignore[no-untyped-def]
    first, finalists, keep_better, kept = settings
    weight, goal, value, error, codes, forms = columns
    metrics = band[2]
    b = metrics.shape[1]
    V, K = codes.shape[2], band[4].shape[2]
    crossed = np.empty((V - 1, K, K), np.float32)
    sought, new = np.empty(b, np.float32), np.empty(b, np.float32)
    picked = np.empty(V, np.int64)
    work = (
        np.empty((V, K), np.float32),
        np.empty(K, np.float32),
        np.empty(b, np.float32),
        np.empty(V, np.int64),
        np.empty(finalists, np.int64),
        np.empty(finalists, np.float32),
    )
    tile = _TILE_ROWS if V == 1 else _CROSSED_ROWS
    forms[start:stop] = 0.0
    for top in range(start, stop, tile):
        for j in range(codes.shape[1] - 1, -1, -1):
            begin, end, block = j * b, (j + 1) * b, first + j
            _cross(crossed, block, band)
            for row in range(top, min(top + tile, stop)):
                aim = goal[row, begin:end]
                for i in range(b):
                    sought[i] = aim[i] / kept
                _encode(sought, picked, new, work, crossed, block, band)
                form = _form(aim, new, metrics[block])
                if keep_better:
                    old = _form(aim, value[row, begin:end], metrics[block])
                    if form >= old:
                        forms[row] += old
                        continue
                forms[row] += form
                codes[row, j] = picked
                for i in range(b):
                    now = weight[row, begin + i] - new[i]
                    change = now - error[row, begin + i]
                    value[row, begin + i], error[row, begin + i] = new[i], now
                    for k in range(begin):
                        goal[row, k] += change * inner[begin + i, k]
