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

_TILE_ROWS = 32
"""Rows whose codes of one block are chosen before those of the next block: for as long the tables
in the block's metric, 3 to 14 KB, stay in the first cache."""
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
    """A vector: `[nb, d, 256]` float32: twice the codewords times the metric."""
    _norms: Any
    """`[V, nb, 256]` float32: the codewords' forms."""
    _pulls: Any
    """`[nb, V, b, b]` float32: what a vector makes up for of the error of the block's others; rows
    past its length are empty."""

    @classmethod
    def of_band(cls, tables: Sequence[Tensor], metrics: Tensor) -> Stages:
        """Prepare a band.

        Args:
            tables: one `[256, d]` float32 a stage; every `d` divides `b`.
            metrics: `[nb, b, b]` float32, symmetric positive definite.
        """
        nb, b, _ = metrics.shape
        starts = np.cumsum([0, *(table.numel() for table in tables)])
        vectors: list[tuple[int, int, int]] = []
        projected, norms = [], []
        pulls = torch.zeros(nb, sum(b // t.shape[1] for t in tables), b, b)
        for table, start in zip(tables, starts[:-1], strict=True):
            d = table.shape[1]
            for first in range(0, b, d):
                here = slice(first, first + d)
                block = metrics[:, here, here]  # [nb, d, d]
                image = table @ block  # [nb, 256, d]
                projected.append((2 * image.transpose(1, 2)).contiguous().numpy())
                norms.append((image * table).sum(-1))
                if d < b:
                    others = metrics[:, here].clone()  # [nb, d, b]
                    others[:, :, here] = 0
                    pulls[:, len(vectors), :d] = torch.linalg.solve(block, others)
                vectors.append((first, d, int(start)))
        return cls(
            np.array(vectors, dtype=np.int64),
            torch.cat([table.reshape(-1) for table in tables]).numpy(),
            metrics.contiguous().numpy(),
            tuple(projected),
            torch.stack(norms).numpy(),
            pulls.numpy(),
        )

    def choose(
        self,
        first: int,
        buffer: Buffer,
        inner: Tensor,
        codes: Tensor,
        sweeps: int,
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
            sweeps: rounds of coordinate descent over a block's vectors.
            kept: what goals are divided by before codewords are looked for.
            keep_better: keep old codes where the new ones are no better.

        Returns:
            `[O]` float64: the forms that were left, a row.
        """
        O = len(codes)  # noqa: E741
        forms = torch.empty(O, dtype=torch.float64)
        rounds = 1 + sweeps if len(self._vectors) > 1 else 1
        columns = (buffer.weight, buffer.goal, buffer.value, buffer.error, codes, forms)
        arrays = tuple(tensor.numpy() for tensor in columns)
        matrix = inner.contiguous().numpy()

        def run(start: int, stop: int) -> None:
            settings = first, rounds, keep_better, np.float32(kept)
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
            self._pulls,
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
def _lowest(scores):  # type: ignore[no-untyped-def]
    """Return where the smallest score stands first."""
    low = scores[0]
    for k in range(scores.size):
        low = lesser(low, scores[k])
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
            codes[b, i] = _lowest(scores)


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
def _encode(goal, turns, new, picked, wanted, scores, block, band):  # type: ignore[no-untyped-def]
    """Choose the codes `picked` of one row's block, and its value `new`."""
    vectors, tables, _, projected, norms, pulls = band
    new[:] = 0.0
    for turn in range(turns):
        for v in range(len(vectors)):
            begin, d, table = vectors[v]
            if turn > 0:
                for i in range(d):
                    new[begin + i] -= tables[table + picked[v] * d + i]
            for i in range(d):
                wanted[i] = goal[begin + i] - new[begin + i]
            if turn > 0 and d < new.size:
                for i in range(d):
                    for k in range(new.size):
                        wanted[i] += pulls[block, v, i, k] * (goal[k] - new[k])
            _score(wanted[:d], projected[v][block], norms[v, block], scores)
            picked[v] = _lowest(scores)
            for i in range(d):
                new[begin + i] += tables[table + picked[v] * d + i]
    new[:] = 0.0  # without what taking away and putting back left behind
    for v in range(len(vectors)):
        begin, d, table = vectors[v]
        for i in range(d):
            new[begin + i] += tables[table + picked[v] * d + i]


@compile_cached
def _choose(start, stop, settings, columns, inner, band):  # type: ignore[no-untyped-def]
    first, turns, keep_better, kept = settings
    weight, goal, value, error, codes, forms = columns
    metrics = band[2]
    b = metrics.shape[1]
    scores = np.empty(band[4].shape[2], np.float32)
    new, wanted = np.empty(b, np.float32), np.empty(b, np.float32)
    sought = np.empty(b, np.float32)
    picked = np.empty(codes.shape[2], np.int64)
    forms[start:stop] = 0.0
    for top in range(start, stop, _TILE_ROWS):
        for j in range(codes.shape[1] - 1, -1, -1):
            begin, end, block = j * b, (j + 1) * b, first + j
            for row in range(top, min(top + _TILE_ROWS, stop)):
                aim = goal[row, begin:end]
                for i in range(b):
                    sought[i] = aim[i] / kept
                _encode(sought, turns, new, picked, wanted, scores, block, band)
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
