"""raise_linears: every product with a parameter becomes aten.linear, as torch writes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.expand_einsum import ExpandEinsum
from fptq_compiler.passes.linears import is_linear
from fptq_compiler.passes.raise_linears import RaiseLinears
from tests.passes.steps import EXACT, assert_settled, change, decomposed, run

WIDTH, INNER, HEADS, HEAD = 6, 12, 3, 4
Spelling = Callable[["Pair", Tensor], Tensor]


class Pair(nn.Module):
    """An embedding, two products with parameters, and what makes logits of them."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)

        self.table = nn.Embedding.from_pretrained(parameter(61, WIDTH))
        self.up, self.bias, self.down = parameter(WIDTH, INNER), parameter(INNER), parameter(INNER,
                                                                                            WIDTH)
        self.heads, self.head_bias = parameter(HEADS, WIDTH, HEAD), parameter(HEADS, HEAD)
        self.merge, self.experts = parameter(HEADS, HEAD, WIDTH), parameter(2, WIDTH, INNER)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.spelling(self, self.table(input_ids))


def conv1d(pair: Pair, x: Tensor) -> Tensor:
    """GPT-2's in transformers."""
    y = torch.addmm(pair.bias, x.view(-1, WIDTH), pair.up).view(*x.shape[:-1], INNER)
    return torch.matmul(y.relu(), pair.down)


def added(pair: Pair, x: Tensor) -> Tensor:
    return (pair.bias + x @ pair.up).relu() @ pair.down


def transposed(pair: Pair, x: Tensor) -> Tensor:
    y = nn.functional.linear(x, pair.up.t(), pair.bias)
    return nn.functional.linear(y.relu(), pair.down.permute(1, 0))


def merged(pair: Pair, x: Tensor) -> Tensor:
    y = nn.functional.linear(x.reshape(-1, WIDTH), pair.up.t(), pair.bias)
    return torch.mm(y.relu(), pair.down).reshape(x.shape)


def batched(pair: Pair, x: Tensor) -> Tensor:
    up = pair.up.unsqueeze(0).expand(x.shape[0], -1, -1)
    return torch.bmm((torch.bmm(x, up) + pair.bias).relu(), pair.down.expand(x.shape[0], -1, -1))


def by_heads(pair: Pair, x: Tensor) -> Tensor:
    y = torch.einsum("bsd,hde->bshe", x, pair.heads) + pair.head_bias
    return torch.einsum("bshe,hed->bsd", y.relu(), pair.merge)


def heads_first(pair: Pair, x: Tensor) -> Tensor:
    y = torch.einsum("xyz,nzw->nxyw", x, pair.heads)
    return torch.einsum("nxyw,nwz->xyz", y.relu(), pair.merge)


def experts(pair: Pair, x: Tensor) -> Tensor:
    """Two experts: a stack of different matrices is no linear layer."""
    return torch.matmul(x.unsqueeze(1), pair.experts).sum(1)


def between_activations(pair: Pair, x: Tensor) -> Tensor:
    return torch.einsum("bsd,btd->bst", x, x)


def tied(pair: Pair, x: Tensor) -> Tensor:
    """The weight has another reader, so its transpose is stored under another name."""
    return (x @ pair.up).relu() @ pair.up.t()


LINEARS: dict[str, tuple[Spelling, int]] = {
    "conv1d": (conv1d, 2), "added": (added, 2), "transposed": (transposed, 2),
    "merged": (merged, 2), "batched": (batched, 2), "by_heads": (by_heads, 2),
    "heads_first": (heads_first, 2), "tied": (tied, 2),
    "experts": (experts, 0), "between_activations": (between_activations, 0),
}


def prepared(spelling: Spelling, *, core: bool = False) -> Program:
    free = Dim.DYNAMIC
    ids = torch.arange(14).reshape(2, 7)
    exported = torch.export.export(
        Pair(spelling).eval(), (ids,), dynamic_shapes=({0: free, 1: free},), strict=False
    )
    program = unlift(decomposed(exported) if core else exported)
    run_passes(program, (Canonicalize(), ExpandEinsum()))
    return program


def linears(program: Program) -> list[Node]:
    return [n for n in program.graph.nodes if is_linear(n)]


BEFORE = """
view = view(embedding, [-1, 6])
addmm = addmm(%bias, view, %up)
sym_size_int_2 = sym_size.int(input_ids, 0)
view_1 = view(addmm, [sym_size_int_2, sym_size_int_3, 12])
relu = relu(view_1)
matmul = matmul(relu, %down)
"""

AFTER = """
linear_default_2 = linear(embedding, %up, %bias)
relu = relu(linear_default_2)
linear_default_1 = linear(relu, %down)
"""


def lines(program: Program) -> list[str]:
    return dump(program.module).splitlines()


def test_text() -> None:
    program = prepared(conv1d)
    assert set(BEFORE.split("\n")) <= {*lines(program), ""}
    run(program, RaiseLinears())
    assert "\n".join(["", *lines(program)[-4:-1], ""]) == AFTER
    assert program.parameter("up").shape == (INNER, WIDTH)
    assert program.parameter("down").shape == (WIDTH, INNER)


@pytest.mark.parametrize("core", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", [n for n, (_, count) in LINEARS.items() if count])
def test_numbers(name: str, core: bool) -> None:
    spelling, count = LINEARS[name]
    program = prepared(spelling, core=core)
    assert change(program, RaiseLinears()) < EXACT
    found = linears(program)
    assert len(found) == count
    for node in found:
        x, y = node.args[0], node.meta["val"]
        assert isinstance(x, Node)
        assert name == "merged" or x.meta["val"].dim() == y.dim() == 3
        assert tuple(y.shape[-1:]) == program.parameter(str(node.args[1].target)).shape[:1]
    takes_bias = name not in ("heads_first", "tied")
    assert (len(found[0].args) == 3) == takes_bias


def test_a_tied_weight_keeps_its_name_and_its_transpose_has_another() -> None:
    program = prepared(tied)
    run(program, RaiseLinears())
    names = [str(node.args[1].target) for node in linears(program)]
    assert names == ["up_linear", "up"]
    assert torch.equal(program.parameter("up_linear"), program.parameter("up").T)


@pytest.mark.parametrize("name", ["experts", "between_activations"])
def test_near_miss(name: str) -> None:
    program = prepared(LINEARS[name][0])
    before = lines(program)
    run(program, RaiseLinears())
    assert lines(program) == before
    assert linears(program) == []


def test_near_miss_a_bias_that_others_read_too_is_no_bias() -> None:
    def twice(pair: Pair, x: Tensor) -> Tensor:
        y = x @ pair.up
        return torch.cat((y, y + pair.bias), -1)

    program = prepared(twice)
    assert change(program, RaiseLinears()) < EXACT
    (linear,) = linears(program)
    assert len(linear.args) == 2


@pytest.mark.parametrize("name", ["conv1d", "by_heads", "batched"])
def test_twice(name: str) -> None:
    program = prepared(LINEARS[name][0])
    run(program, RaiseLinears())
    assert_settled(program, RaiseLinears())
