"""The weight quantiser: rounded anew at every step, or codes that stand at any scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptq_compiler.quant.modules import WeightFakeQuantizer


def _quantizer(block: int) -> tuple[WeightFakeQuantizer, Tensor]:
    """A quantiser of (6, 10) at 4 bits, and a weight on its grid."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, generator=generator)
    quantizer = WeightFakeQuantizer(4, weight.shape, block)
    quantizer.set_scale(0.1 + torch.rand(quantizer.scale.shape, generator=generator))
    return quantizer, quantizer(weight).detach()


@pytest.mark.parametrize("block", [0, 4])
def test_kept_codes_stand_at_any_scale(block: int) -> None:
    quantizer, weight = _quantizer(block)
    codes = quantizer.codes(weight)
    quantizer.keep_codes()
    assert torch.equal(quantizer(weight), weight)
    quantizer.set_scale(quantizer.scale * 1.3)
    torch.testing.assert_close(quantizer(weight), weight * 1.3)
    assert torch.equal(quantizer.codes(weight), codes)


def test_without_them_a_larger_scale_rounds_anew() -> None:
    quantizer, weight = _quantizer(0)
    codes = quantizer.codes(weight)
    quantizer.set_scale(quantizer.scale * 1.3)
    assert not torch.equal(quantizer.codes(weight), codes)


def test_the_gradient_of_a_scale_are_the_codes() -> None:
    """Of values on the grid the straight-through gradient sees no error, and is 0 inside."""
    quantizer, weight = _quantizer(0)
    codes = quantizer.codes(weight).float()
    quantizer.keep_codes()
    quantizer(weight).sum().backward()
    assert quantizer.scale.grad is not None
    torch.testing.assert_close(quantizer.scale.grad, codes.sum(1))
