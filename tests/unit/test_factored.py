"""Maps as a scale and Kronecker factors: the same matrix, whatever they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptq_compiler.passes.freeze_online import mix, mixed
from fptq_compiler.transforms import (
    Affine,
    Diagonal,
    Hadamard,
    Identity,
    Kronecker,
    Map,
    RopePairs,
    Rotation,
    factored,
)

MAPS: dict[str, Map] = {
    "diagonal": Diagonal(12),
    "hadamard": Hadamard(40),
    "blocks": Hadamard(24, blocks=3),
    "identity": Identity(6),
    "affine": Affine(1, 6),
    "heads": Kronecker(Hadamard(4), Identity(6)),
    "identity first": Kronecker(Identity(3), Hadamard(40)),
    "blocks on one side": Kronecker(Hadamard(24, blocks=3), Rotation(5)),
    "two learned": Kronecker(Affine(1, 4), Affine(1, 6)),
}


def _dense(transform: Map) -> Tensor:
    form = factored(transform)
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in form.full(transform.size):
        one = torch.eye(factor, dtype=torch.float64) if isinstance(factor, int) else factor
        product = torch.kron(product, one)
    return product if form.scale is None else form.scale.unsqueeze(1) * product


@pytest.mark.parametrize("name", MAPS)
def test_the_factors_make_the_map_and_are_computed_in_their_order(name: str) -> None:
    transform = MAPS[name]
    generator = torch.Generator().manual_seed(3)
    transform.randomize_(generator, 0.7)
    # float64 sums of at most 120 products
    torch.testing.assert_close(_dense(transform), transform.matrix(), rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, transform.size, generator=generator, dtype=torch.float64)
    form = factored(transform)
    found = mix(x, form.scale, *form.factors)
    expected = transform.right(x)[..., mixed(transform.size, form.orders)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_map_that_is_merged_has_no_such_form() -> None:
    pairs = RopePairs(torch.tensor([[0, 1]]), torch.tensor([], dtype=torch.long), 1, 2)
    for transform in (pairs, Affine(2, 3)):
        with pytest.raises(TypeError, match="has no form with small factors"):
            factored(transform)
