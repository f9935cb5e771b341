"""raise_norms: every spelling of RMSNorm becomes one operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.fold_constants import FoldConstants
from fptq_compiler.passes.raise_norms import RaiseNorms
from tests.passes.steps import (
    EXACT,
    assert_settled,
    captured,
    change,
    exported_module,
    logits,
    pick,
    run,
    span,
)
from tests.toys import ToyConfig

SPELLED = ToyConfig(layers=1, norm="spelled")
READY = (Canonicalize(), FoldConstants())

BEFORE = """
pow_1 = pow.Tensor_Scalar(embedding, 2)
mean = mean.dim(pow_1, [-1], True)
add = add(mean, 1e-05)
rsqrt = rsqrt(add)
mul_1 = mul(embedding, rsqrt)
mul_2 = mul(%model.layers.0.input_layernorm.weight, mul_1)
linear = linear(mul_2, %model.layers.0.self_attn.q_proj.weight)
"""

AFTER = """
rms_norm_default_3 = fptq.rms_norm(embedding, %model.layers.0.input_layernorm.weight, 1e-05)
linear = linear(rms_norm_default_3, %model.layers.0.self_attn.q_proj.weight)
"""


def test_text() -> None:
    program = captured(SPELLED, *READY)
    assert span(program, "pow_1", "linear") == BEFORE
    assert run(program, RaiseNorms()).changed == 3
    assert pick(program, "rms_norm_default_3", "linear") == AFTER


@pytest.mark.parametrize("norm", ["op", "spelled", "spelled_mul", "one_plus"])
def test_numbers(norm: str) -> None:
    program = captured(ToyConfig(layers=1, norm=norm), *READY)  # type: ignore[arg-type]
    assert change(program, RaiseNorms()) < EXACT
    assert len(program.call_nodes(ops.rms_norm)) == 3


class Normed(nn.Module):
    """An embedding behind one formula."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 4)
        self.table.weight.data = torch.arange(61 * 4.0).view(61, 4).cos()
        self.formula = formula

    def forward(self, ids: Tensor) -> Tensor:
        return self.formula(self.table(ids))


def _program(formula: Callable[[Tensor], Tensor]) -> Program:
    return exported_module(Normed(formula), torch.zeros(2, 7, dtype=torch.long), *READY)


def _mean(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True) + 1e-5


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x / torch.sqrt(_mean(x)),
        lambda x: x * (1 / torch.sqrt(_mean(x))),
        lambda x: _mean(x).pow(-0.5) * x,
        lambda x: x * torch.sqrt(_mean(x)).reciprocal(),
    ],
    ids=["root", "one_by_root", "power", "reciprocal"],
)
def test_other_roots(formula: Callable[[Tensor], Tensor]) -> None:
    program = _program(formula)
    assert change(program, RaiseNorms()) < EXACT
    (norm,) = program.call_nodes(ops.rms_norm)
    assert pick(program, norm.name) == f"\n{norm.name} = fptq.rms_norm(embedding, None, 1e-05)\n"


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (
            lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5),
            "the mean is over axes [1], expected the last",
        ),
        (
            lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5),
            "the power is 4, expected 2",
        ),
        (
            lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-5),
            "expected aten.mean.dim, found aten.sum.dim_IntList",
        ),
        (
            lambda x: (x + 1) * torch.rsqrt(_mean(x)),
            "embedding is not the x that stands elsewhere",
        ),
        (
            lambda x: 3 / torch.sqrt(_mean(x)) * x,
            "the root divides 3, expected 1",
        ),
    ],
    ids=["axis", "power", "sum", "other_x", "three"],
)
def test_near_miss(formula: Callable[[Tensor], Tensor], reason: str) -> None:
    result = run(_program(formula), RaiseNorms())
    assert result.changed == 0
    (miss,) = result.near_misses
    assert miss.what == "norm"
    assert miss.reason == f"not an RMSNorm: {reason}"
    assert 'test_raise_norms.py", line' in miss.source


def _unit(x: Tensor, *, root: float = 2.0, axis: int = -1, least: float = 1e-12) -> Tensor:
    return functional.normalize(x, dim=axis, eps=least) * root


def test_a_unit_vector_times_the_root_of_the_width() -> None:
    program = _program(_unit)
    assert change(program, RaiseNorms()) < EXACT
    (norm,) = program.call_nodes(ops.rms_norm)
    assert norm.args[1:] == (None, 1e-24 / 4)


@pytest.mark.parametrize("off", [{"root": 3.0}, {"axis": 1}, {"least": 1e-3}])
def test_near_miss_of_a_unit_vector(off: dict[str, float]) -> None:
    program = _program(lambda x: _unit(x, **off))  # type: ignore[arg-type]
    assert run(program, RaiseNorms()).changed == 0


GAIN, BIAS = torch.linspace(0.5, 2.0, 4), torch.linspace(-1.0, 1.0, 4)


class Affine(nn.Module):
    """A LayerNorm without parameters, then a gain and a bias in operators."""

    def __init__(self, *, between: bool) -> None:
        super().__init__()
        self.table, self.between = nn.Embedding(61, 4), between
        self.gain, self.bias = nn.Parameter(GAIN), nn.Parameter(BIAS)

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.layer_norm(self.table(ids), (4,)) * self.gain
        return (x.tanh() if self.between else x) + self.bias


@pytest.mark.parametrize("between", [False, True])
def test_a_layer_norm_takes_its_gain_and_bias(between: bool) -> None:
    """What stands behind something else stays there."""
    ids = torch.zeros(2, 7, dtype=torch.long)
    program = exported_module(Affine(between=between), ids, *READY)
    before = logits(program)
    run(program, RaiseNorms())
    assert relative_error(logits(program), before) < EXACT
    (norm,) = program.call_nodes(torch.ops.aten.layer_norm.default)
    assert ("%gain" in pick(program, norm.name), "%bias" in pick(program, norm.name)) == (
        True, not between
    )


def test_twice() -> None:
    assert_settled(captured(SPELLED, *READY, RaiseNorms()), RaiseNorms())
