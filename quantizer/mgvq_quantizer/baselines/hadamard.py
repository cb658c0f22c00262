"""Random orthogonal turns that make weights look normal (for `quip`).

A turn is a diagonal of random signs followed by a Hadamard matrix. Orders that are no power of two
are Kronecker products with matrices of Paley's first construction (order q + 1 for a prime q that
leaves 3 when divided by 4: 12, 20, 24, 32, 44, ...). Where no product gives the order, the largest
power of two that divides it turns block by block.

Source: QuIP# (arXiv 2402.04396), section 3; R. Paley, "On orthogonal matrices", 1933.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Turn:
    """An orthogonal matrix `H diag(signs)`, block by block."""

    signs: Tensor
    """`[n]` float32, each 1 or -1."""
    block: Tensor
    """`[b, b]` float32, orthogonal; b divides n."""

    @classmethod
    def random(cls, order: int, generator: torch.Generator) -> Turn:
        """Draw the signs of a turn of `[order]` vectors."""
        signs = 2.0 * torch.randint(2, (order,), generator=generator) - 1.0
        return cls(signs, hadamard_block(order))

    def forward(self, rows: Tensor) -> Tensor:
        """Turn every row of `[..., n]`."""
        return self._blockwise(rows * self.signs.to(rows), self.block.T)

    def backward(self, rows: Tensor) -> Tensor:
        """Undo `forward`."""
        return self._blockwise(rows, self.block) * self.signs.to(rows)

    def _blockwise(self, rows: Tensor, matrix: Tensor) -> Tensor:
        parts = rows.reshape(*rows.shape[:-1], -1, matrix.shape[0])
        return (parts @ matrix.to(rows)).flatten(-2)


def hadamard_block(order: int) -> Tensor:
    """Return the orthogonal Hadamard matrix `[b, b]` for the largest order b we know of this one.

    b is `order` itself where Sylvester's and Paley's constructions reach it, else the largest power
    of two that divides it.
    """
    matrix = _hadamard(order)
    if matrix is None:
        matrix = _hadamard(order & -order)
    assert matrix is not None, "powers of two have Hadamard matrices"
    return matrix / matrix.shape[0] ** 0.5


def _hadamard(order: int) -> Tensor | None:
    """Return a matrix of ones and minus ones with orthogonal rows, or None where none is found."""
    if order == 1:
        return torch.ones(1, 1)
    if order & (order - 1) == 0:
        half = _hadamard(order // 2)
        assert half is not None
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), half)
    for factor in range(order, 8, -4) if order % 4 == 0 else ():
        if order % factor == 0 and _is_prime(factor - 1):
            rest = _hadamard(order // factor)
            if rest is not None:
                return torch.kron(rest, _paley(factor - 1))
    return None


def _paley(q: int) -> Tensor:
    """Return Paley's matrix of order q + 1 for a prime q = 3 mod 4."""
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)])
    shift = (torch.arange(q)[:, None] - torch.arange(q)) % q
    skew = torch.zeros(q + 1, q + 1)
    skew[0, 1:] = 1.0
    skew[1:, 0] = -1.0
    skew[1:, 1:] = character[shift]
    return skew + torch.eye(q + 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
