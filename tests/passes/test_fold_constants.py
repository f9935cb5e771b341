"""fold_constants: what depends on parameters alone becomes a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import Pass
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import ROUNDING
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.fold_constants import FoldConstants
from tests.passes.steps import assert_settled, captured, change, exported_module, pick, run
from tests.toys import ToyConfig

ONE_PLUS = ToyConfig(layers=1, norm="one_plus")

BEFORE = """
add_1 = add(%model.layers.0.input_layernorm.weight, 1.0)
mul_2 = mul(mul_1, add_1)
"""

AFTER = """
mul_2 = mul(mul_1, %model.layers.0.input_layernorm.weight_folded)
"""


def test_text() -> None:
    program = captured(ONE_PLUS, Canonicalize())
    assert pick(program, "add_1", "mul_2") == BEFORE
    weight = program.parameter("model.layers.0.input_layernorm.weight")
    # Three norms, and the frequencies that every export unsqueezes.
    assert run(program, FoldConstants()).changed == 4
    assert pick(program, "mul_2") == AFTER
    folded = program.parameter("model.layers.0.input_layernorm.weight_folded")
    assert torch.equal(folded, weight + 1.0)


def test_numbers() -> None:
    # 1 + gain is rounded to float32 where it is stored, but not in a float64 run of the
    # original: the verifier's allowance for exactly this.
    assert change(captured(ONE_PLUS, Canonicalize()), FoldConstants()) < ROUNDING[torch.float32]
    # In float64 the stored sum is the computed one, so nothing changes at all.
    wide = ToyConfig(layers=1, norm="op", dtype=torch.float64)
    assert change(captured(wide, Canonicalize()), FoldConstants()) == 0


class Expanded(nn.Module):
    """A row of parameters that is repeated before it meets the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 4)
        self.row = nn.Parameter(torch.arange(4.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.row.view(1, 4).expand(4, 4)


def _expanded(*steps: Pass) -> Program:
    return exported_module(Expanded(), torch.zeros(2, 7, dtype=torch.long), *steps)


def test_near_miss() -> None:
    """An expression that is larger than its parameters stays: folding would grow the file."""
    program = _expanded(Canonicalize())
    before = dump(program.module)
    assert "expand = expand(view, [4, 4])" in before
    assert run(program, FoldConstants()).changed == 0
    assert dump(program.module) == before


def test_twice() -> None:
    assert_settled(captured(ONE_PLUS, Canonicalize(), FoldConstants()), FoldConstants())
