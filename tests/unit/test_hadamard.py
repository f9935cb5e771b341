"""Hadamard matrices exist where they are said to, and every width is mixed orthogonally."""

from __future__ import annotations

from math import prod, sqrt

import pytest
import torch

from fptq_compiler.transforms import Hadamard, factors, has_hadamard, random_signs
from fptq_compiler.transforms.hadamard_factors import hadamard_matrix, hartley_matrix, plan

EXACT = 1e-13  # a few hundred float64 roundings of entries below one
ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 48, 60, 64, 68, 72, 76, 80, 84, 140, 148]


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: int) -> None:
    assert has_hadamard(order)
    signs = hadamard_matrix(order) * sqrt(order)
    assert bool(((signs.abs() - 1).abs() < EXACT).all())
    whole = signs.round()
    assert torch.equal(whole @ whole.mT, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 18, 40, 52, 92])
def test_orders_without_a_construction_are_refused(order: int) -> None:
    assert not has_hadamard(order)
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
        hadamard_matrix(order)


@pytest.mark.parametrize("order", [1, 3, 43, 511])
def test_hartley_is_symmetric_and_orthogonal(order: int) -> None:
    matrix = hartley_matrix(order)
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=EXACT)
    one = torch.eye(order, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix, one, rtol=0, atol=1e-12)


def test_every_width_up_to_200_is_orthogonal_and_fully_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in range(1, 201):
        map = Hadamard(width, random_signs(width, generator))
        matrix = map.matrix()
        one = torch.eye(width, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.mT, one, rtol=0, atol=EXACT)
        assert prod(map.orders) == width
        assert len(map.orders) <= 3
        assert float(matrix.abs().max()) <= 2 ** (len(map.orders) / 2) / sqrt(width) + EXACT


@pytest.mark.parametrize(
    ("width", "orders"),
    [
        (64, (64,)),
        (576, (24, 24)),
        (960, (48, 20)),
        (1536, (48, 32)),
        (8960, (28, 20, 16)),
        (14336, (32, 28, 16)),
        (18944, (148, 128)),
    ],
)
def test_widths_of_real_models_are_pure_hadamard(width: int, orders: tuple[int, ...]) -> None:
    assert tuple(factor.order for factor in plan(width)) == orders
    assert all(factor.hadamard for factor in plan(width))
    assert [matrix.shape[0] for matrix in factors(width)] == list(orders)


def test_description() -> None:
    assert Hadamard(1536).describe() == "48 x 32 Hadamard"
    assert Hadamard(172).describe() == "4 Hadamard x 43 Hartley"
    assert Hadamard(16, blocks=2).describe() == "block diagonal, 2 blocks of 8 Hadamard"
    assert Hadamard(4 * 521).describe() == "block diagonal, 521 blocks of 4 Hadamard"
    assert Hadamard(521).describe() == "block diagonal, 521 blocks of signs only"


def test_large_prime_stays_block_diagonal_and_orthogonal() -> None:
    matrix = Hadamard(4 * 521).matrix()
    assert float(matrix[:4, 4:].abs().max()) == 0.0
    x = torch.randn(2, 4 * 521, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((x @ matrix).norm(), x.norm(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("width", [172, 1536])
def test_factored_form_is_reshape_and_matmul(width: int) -> None:
    map = Hadamard(width, random_signs(width, torch.Generator().manual_seed(1)))
    first, second = map.factor_matrices()
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grid = (x * map.signs).view(3, first.shape[0], second.shape[0])
    expected = torch.einsum("nij,ik,jl->nkl", grid, first, second).reshape(3, width)
    torch.testing.assert_close(map.right(x), expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_trainable_and_randomize_flips_signs() -> None:
    map = Hadamard(64)
    assert not list(map.parameters())
    map.randomize_(torch.Generator().manual_seed(0), 1.0)
    flipped = int((map.signs < 0).sum())
    assert 16 <= flipped <= 48  # 32 ± 4 standard deviations


def test_no_width_below_one() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plan(0)
