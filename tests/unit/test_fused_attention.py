"""Fused attention: values and gradients of the operator, which runs where none is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fptq_compiler.graph import ops
from fptq_compiler.optimize import fused_attention as module
from fptq_compiler.optimize.fused_attention import fused_attention

PLAIN: dict[str, Any] = {"mask": None, "causal": True, "scale": 0.3}


def inputs(generator: torch.Generator, heads: int = 6, past: int = 0) -> list[Tensor]:
    """Queries, keys and values of three key heads; values are narrower."""
    shapes = (2, heads, 9, 8), (2, 3, 9 + past, 8), (2, 3, 9 + past, 4)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [3, 6])
def test_values_and_gradients_are_the_operators(
    generator: torch.Generator, heads: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(generator, heads)
    exact = ops.attention(*given, None, causal, 0.3)
    expected = torch.autograd.grad(exact.square().sum(), given)
    monkeypatch.setattr(ops, "attention", None)
    found = fused_attention(*given, None, causal, 0.3)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)  # float32, another order
    gradients = torch.autograd.grad(found.square().sum(), given)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "past"),
    [
        ({"softcap": 2.0}, 0), ({"window": 4}, 0), ({}, 3),
        ({"mask": torch.ones(9, 9, dtype=torch.bool).tril(2)}, 0),
    ],
    ids=["soft cap", "window", "past", "mask"],
)
def test_what_has_no_fused_kernel_is_the_operator(
    generator: torch.Generator, change: dict[str, Any], past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "scaled_dot_product_attention", None)
    given, settings = inputs(generator, past=past), {**PLAIN, **change}
    assert torch.equal(fused_attention(*given, **settings), ops.attention(*given, **settings))


def test_without_a_causal_mask_the_keys_may_be_more(generator: torch.Generator) -> None:
    given, settings = inputs(generator, past=3), {**PLAIN, "causal": False}
    exact = ops.attention(*given, **settings)
    torch.testing.assert_close(fused_attention(*given, **settings), exact, rtol=1e-5, atol=1e-6)
