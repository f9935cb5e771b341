"""Small orthogonal matrices of equal-sized entries, and how to split a width into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, pi, prod, sqrt

import torch
from torch import Tensor

LARGEST = 512
"""No factor is larger: it is applied as a dense matrix."""
PASS_COST = 128
"""What one more pass over the activations costs, in multiply-adds per channel; a rough weight."""


@dataclass(frozen=True)
class Factor:
    """One factor of a width: a Hadamard matrix, or for an odd order a Hartley matrix."""

    order: int
    hadamard: bool

    def matrix(self) -> Tensor:
        """(order, order) float64, orthogonal."""
        return hadamard_matrix(self.order) if self.hadamard else hartley_matrix(self.order)


def factors(n: int) -> list[Tensor]:
    """Orthogonal float64 matrices whose Kronecker product mixes n channels.

    Their orders multiply to n, except where n has a prime factor above 512: that factor stays an
    identity (outermost), and the orders multiply to n divided by it.

    Raises:
        ValueError: n is not positive.
    """
    return [factor.matrix() for factor in plan(n)]


@lru_cache(maxsize=256)
def plan(n: int) -> tuple[Factor, ...]:
    """The cheapest split of n, largest order first.

    Hadamard factors cover as much of n as they can (all their entries have one size); Hartley
    factors take what remains. Among those splits the least `sum of orders + 128 per factor`
    wins, since each factor is one dense multiplication and one pass over the activations. In
    practice that gives two factors, three for wide layers: 576 = 24 x 24, 1536 = 48 x 32.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        message = f"a width must be positive, got {n}"
        raise ValueError(message)
    mixed = n // prod(prime for prime in _primes(n) if prime > LARGEST)
    splits: list[tuple[Factor, ...]] = []
    count = 1
    while not splits:  # every prime up to 512 has a factor, so this ends
        count = max(count + 1, 3)
        splits = list(_splits(mixed, LARGEST, count))
    return min(splits, key=_cost)


def _cost(split: tuple[Factor, ...]) -> tuple[int, int, tuple[int, ...]]:
    orders = tuple(factor.order for factor in split)
    unequal = prod(factor.order for factor in split if not factor.hadamard)
    return unequal, sum(orders) + PASS_COST * len(orders), orders


def _splits(n: int, largest: int, count: int) -> Iterator[tuple[Factor, ...]]:
    if n == 1:
        yield ()
    elif count > 0:
        for order in range(min(n, largest), 1, -1):
            if n % order:
                continue
            hadamard = has_hadamard(order)
            if hadamard or order % 2:
                for rest in _splits(n // order, order, count - 1):
                    yield (Factor(order, hadamard), *rest)


def has_hadamard(order: int) -> bool:
    """Whether `hadamard_matrix` can build this order (2^k, Paley I or Paley II)."""
    return _is_power_of_two(order) or _is_paley_one(order) or _is_paley_two(order)


def hadamard_matrix(order: int) -> Tensor:
    """A Hadamard matrix over sqrt(order): (order, order) float64, orthogonal, entries ±.

    Sylvester for powers of two; Paley I for q + 1 with a prime q = 3 mod 4; Paley II for
    2 (q + 1) with a prime q = 1 mod 4.

    Raises:
        ValueError: no construction gives this order.
    """
    if _is_power_of_two(order):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        while matrix.shape[0] < order:
            matrix = torch.kron(step, matrix)
    elif _is_paley_one(order):
        matrix = _conference(order - 1, -1) + torch.eye(order, dtype=torch.float64)
    elif _is_paley_two(order):
        conference = _conference(order // 2 - 1, 1)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(conference, plus)
        matrix += torch.kron(torch.eye(order // 2, dtype=torch.float64), minus)
    else:
        message = f"no Hadamard matrix of order {order} among Sylvester, Paley I and Paley II"
        raise ValueError(message)
    return matrix / sqrt(order)


def hartley_matrix(order: int) -> Tensor:
    """cas(2π ij / order) / sqrt(order), cas = cos + sin: symmetric and orthogonal, float64."""
    index = torch.arange(order, dtype=torch.int64)
    angle = (torch.outer(index, index) % order).to(torch.float64) * (2 * pi / order)
    return (angle.cos() + angle.sin()) / sqrt(order)


def _conference(q: int, sign: int) -> Tensor:
    """[[0, 1], [sign, Q]] with Q_ij the quadratic character of i - j modulo the prime q."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = float(sign)
    matrix[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return matrix


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and _primes(order - 1) == [order - 1]


def _is_paley_two(order: int) -> bool:
    q = order // 2 - 1
    return order % 4 == 0 and q % 4 == 1 and _primes(q) == [q]


def _primes(n: int) -> list[int]:
    """The prime factors of n in ascending order, with repetition; none for n < 2."""
    found: list[int] = []
    divisor = 2
    while divisor <= isqrt(max(n, 0)):
        if n % divisor == 0:
            found.append(divisor)
            n //= divisor
        else:
            divisor += 1
    return [*found, n] if n > 1 else found
