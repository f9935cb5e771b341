"""expand_einsum: every einsum of two operands is permutations around one matmul."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.expand_einsum import ExpandEinsum
from tests.passes.steps import EXACT, assert_settled, change, run

EQUATIONS = (
    "bshd,bthd->bhst", "bshd,bthd->bsht", "bshd,bthd->htbs", "bshd,bthd->bst", "xyzw,xuzw->xzyu",
    "bshd,bsge->hdge", "bshd,btge->shdtge",
)
LEFT_ALONE = (
    "bshd,bthe->hde", "bshd,bshe->bshde", "bshd,bthd,bshd->bst", "...hd,...hd->...h", "bshd->bdhs",
)


class Pair(nn.Module):
    """Two values (B, S, 2, 3) from one table; the einsum's mean makes the result's shape plain."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(61, 12, generator=generator)
        self.table = nn.Embedding.from_pretrained(values)

    def forward(self, input_ids: Tensor) -> Tensor:
        q, k = self.table(input_ids).unflatten(-1, (2, 2, 3)).unbind(2)
        count = self.equation.split("->")[0].count(",") + 1
        return torch.einsum(self.equation, *[q, k, q][:count])


def prepared(equation: str) -> Program:
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    ids = torch.arange(14).reshape(2, 7)
    exported = torch.export.export(Pair(equation), (ids,), dynamic_shapes=(free,), strict=False)
    program = unlift(exported)
    run_passes(program, (Canonicalize(),))
    return program


BEFORE = "einsum = einsum('bshd,bthd->bhst', [getitem, getitem_1])"
AFTER = """
permute_default = permute(getitem, [0, 2, 1, 3])
permute_default_1 = permute(getitem_1, [0, 2, 3, 1])
matmul_default = matmul(permute_default, permute_default_1)
return [matmul_default]
"""


def text(program: Program) -> str:
    return "\n".join(["", *dump(program.module).splitlines()[-4:], ""])


def test_text() -> None:
    program = prepared("bshd,bthd->bhst")
    assert BEFORE in text(program)
    run(program, ExpandEinsum())
    assert text(program) == AFTER


@pytest.mark.parametrize("equation", EQUATIONS)
def test_numbers(equation: str) -> None:
    program = prepared(equation)
    assert change(program, ExpandEinsum()) < EXACT
    assert "einsum" not in dump(program.module)


@pytest.mark.parametrize("equation", LEFT_ALONE)
def test_near_miss(equation: str) -> None:
    """A letter that one operand sums alone, no sum, three operands, an ellipsis, one operand."""
    program = prepared(equation)
    before = dump(program.module)
    assert run(program, ExpandEinsum()).changed == 0
    assert dump(program.module) == before


def test_twice() -> None:
    program = prepared("bshd,bthd->htbs")
    run(program, ExpandEinsum())
    assert_settled(program, ExpandEinsum())
