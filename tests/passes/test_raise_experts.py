"""raise_experts: a mixture whose experts share one parameter gets linears for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.raise_experts import RaiseExperts
from tests.passes.steps import EXACT, ONE, assert_settled, change, edited, logits, run, span
from tests.toys import Layer, Toy

EXPERTS, CHOSEN, WIDTH, HIDDEN = 4, 2, 24, 10
Combine = Callable[["Mixture", Tensor, Tensor], Tensor]


class Mixture(nn.Module):
    """Two of four gated experts for each token, their weights gathered by the choice."""

    def __init__(self, *, transposed: bool = False, between: Combine | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"router": (EXPERTS, WIDTH), "up": (EXPERTS, 2 * HIDDEN, WIDTH),
                  "down": (EXPERTS, WIDTH, HIDDEN), "bias": (EXPERTS, HIDDEN)}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            value = value.mT.contiguous() if transposed and value.dim() == 3 else value
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        self.transposed, self.between = transposed, between

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = functional.softmax(functional.linear(tokens, cast(Tensor, self.router)), -1)
        shares, chosen = scores.topk(CHOSEN, -1)
        shares = shares / shares.sum(-1, keepdim=True)
        numbers = chosen.reshape(-1)
        rows = tokens.repeat_interleave(CHOSEN, 0)
        gate, up = self.product("up", rows, numbers).chunk(2, -1)
        hidden = functional.silu(gate) * up
        if self.between is not None:
            hidden = self.between(self, hidden, numbers)
        out = self.product("down", hidden, numbers) * shares.reshape(-1, 1)
        return out.view(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)

    def product(self, name: str, rows: Tensor, numbers: Tensor) -> Tensor:
        weight = cast(Tensor, getattr(self, name))[numbers]
        if self.transposed:
            return torch.bmm(rows.unsqueeze(1), weight).squeeze(1)
        return torch.bmm(weight, rows.unsqueeze(-1)).squeeze(-1)


def _model(mixture: Mixture) -> Program:
    def edit(toy: Toy) -> None:
        cast(Layer, toy.model.layers[0]).mlp = mixture  # type: ignore[assignment]

    return edited(ONE, edit, Canonicalize())


BEFORE = """
index = index(%model.layers.0.mlp.up, [reshape_3])
unsqueeze_4 = unsqueeze(repeat_interleave, -1)
bmm = bmm(index, unsqueeze_4)
"""

ROUTER = """
eq_tensor = eq(unsqueeze_default, arange_default)
unsqueeze_default_1 = unsqueeze(div, -1)
to_dtype = to.dtype(eq_tensor, torch.float32)
mul_tensor = mul(to_dtype, unsqueeze_default_1)
sum_dim_int_list = sum.dim_IntList(mul_tensor, [1])
"""

EXPERT = """
linear_default_2 = linear(reshape_2, %model.layers.0.mlp.1.up.weight)
split_with_sizes_default_2 = split_with_sizes(linear_default_2, [10, 10], -1)
getitem_6 = getitem(split_with_sizes_default_2, 0)
getitem_7 = getitem(split_with_sizes_default_2, 1)
silu_2 = silu(getitem_6)
mul_8 = mul(silu_2, getitem_7)
linear_default_3 = linear(mul_8, %model.layers.0.mlp.1.down.weight)
slice_tensor_1 = slice(sum_dim_int_list, 1, 1, 2)
mul_tensor_2 = mul(linear_default_3, slice_tensor_1)
add_tensor = add(mul_tensor_1, mul_tensor_2)
"""


def test_text() -> None:
    program = _model(Mixture())
    assert span(program, "index", "bmm") == BEFORE
    assert run(program, RaiseExperts()).changed == 1
    assert span(program, "eq_tensor", "sum_dim_int_list") == ROUTER
    assert span(program, "linear_default_2", "add_tensor") == EXPERT
    assert not program.call_nodes(torch.ops.aten.bmm.default)


@pytest.mark.parametrize("transposed", [False, True])
def test_numbers(transposed: bool) -> None:
    assert change(_model(Mixture(transposed=transposed)), RaiseExperts()) < EXACT


def test_weights_are_views() -> None:
    """An expert's weight lies where it lay: nothing is copied."""
    mixture = Mixture()
    program = _model(mixture)
    before = program.parameter("model.layers.0.mlp.up").data_ptr()
    run(program, RaiseExperts())
    assert program.parameter("model.layers.0.mlp.0.up.weight").data_ptr() == before


def test_every_expert_is_a_site_and_every_transform_holds() -> None:
    program = _model(Mixture())
    expected = logits(program)
    for step in FIND_SITES:
        run(program, step)
    assert [s.name for s in program.sites.mlp] == [
        f"model.layers.0.mlp.{e}" for e in range(EXPERTS)
    ]
    assert [r.weight for r in program.sites.routers] == ["model.layers.0.mlp.router"]
    transforms = ("residual", "scaling", "updown", "hadamard")
    for step in insertion(transforms, seed=0, scaling_places=("down_proj",)):
        run(program, step)
    assert program.scaled
    assert {n.partition(".")[0] for n in program.maps} == {"residual", "updown", "hadamard"}
    assert relative_error(logits(program), expected) < EXACT


def _biased(mixture: Mixture, hidden: Tensor, numbers: Tensor) -> Tensor:
    return hidden + cast(Tensor, mixture.bias)[numbers]


def _third(mixture: Mixture, hidden: Tensor, numbers: Tensor) -> Tensor:
    back = mixture.product("down", hidden, numbers)
    return functional.silu(mixture.product("up", back, numbers))[:, :HIDDEN]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (_biased, "between an expert's linears stands more than its activation"),
        (_third, "4 products with chosen experts, expected two: up and down"),
    ],
)
def test_near_miss(between: Combine, reason: str) -> None:
    program = _model(Mixture(between=between))
    result = run(program, RaiseExperts())
    (miss,) = result.near_misses
    assert (result.changed, miss.what, miss.reason) == (0, "experts", reason)
    assert 'test_raise_experts.py", line' in miss.source


def test_near_miss_the_proof_fails() -> None:
    """Experts that see their neighbour's row are no function of a token."""
    program = _model(Mixture(between=lambda _, hidden, __: hidden + hidden.roll(1, 0)))
    result = run(program, RaiseExperts())
    (miss,) = result.near_misses
    assert miss.reason == "the experts computed one by one give something else"
    assert result.changed == 0


def test_twice() -> None:
    program = _model(Mixture())
    run(program, RaiseExperts())
    assert_settled(program, RaiseExperts())
