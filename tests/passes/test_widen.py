"""widen: a half-precision graph becomes a float32 one, value by value."""

from __future__ import annotations

import pytest
import torch

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes.widen import Widen
from tests.passes.steps import ONE, assert_settled, captured, pick, run
from tests.toys import ToyConfig, make_tokens, make_toy

HALF = ToyConfig(layers=1, norm="spelled", dtype=torch.bfloat16)

BEFORE = """
to_3 = to.dtype(embedding, torch.float32)
mul_1 = mul(to_3, rsqrt)
to_4 = to.dtype(mul_1, torch.bfloat16)
"""

AFTER = """
to_3 = to.dtype(embedding, torch.float32)
mul_1 = mul(to_3, rsqrt)
to_4 = to.dtype(mul_1, torch.float32)
"""


def test_text() -> None:
    program = captured(HALF)
    site = ("to_3", "mul_1", "to_4")
    assert pick(program, *site) == BEFORE
    assert run(program, Widen()).changed == len(list(make_toy(HALF).parameters()))
    assert pick(program, *site) == AFTER
    assert {p.dtype for p in program.module.parameters()} == {torch.float32}
    # The recorded values follow, for later passes read dtypes there.
    assert program.node("embedding").meta["val"].dtype == torch.float32


def test_numbers() -> None:
    ids = make_tokens(HALF, 2, 9)
    program = captured(HALF)
    run(program, Widen())
    original = captured(HALF)
    for name, parameter in original.module.named_parameters():
        # No tolerance: every bfloat16 number is a float32 number.
        assert torch.equal(program.parameter(name), parameter.float()), name
    exact = evaluate.logits(original.module, original.arguments(ids), torch.float64)
    # Float32 arithmetic rounds to 6e-8 an operation, of which a toy has about a hundred;
    # bfloat16 rounds to 4e-3 and is off by more.
    assert relative_error(program.run(ids).double(), exact) < 1e-5
    assert relative_error(original.run(ids).double(), exact) > 1e-3


def test_tied_parameters_stay_one() -> None:
    program = captured(ToyConfig(layers=1, tied=True, dtype=torch.float16))
    run(program, Widen())
    table = program.node("embedding").args[0]
    assert isinstance(table, torch.fx.Node)
    heads = [n.args[1] for n in program.call_nodes(torch.ops.aten.linear.default)]
    pointers = {
        program.parameter(str(n.target)).data_ptr()
        for n in (table, heads[-1])
        if isinstance(n, torch.fx.Node)
    }
    assert len(pointers) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_near_miss(dtype: torch.dtype) -> None:
    """Wide and integer tensors are left alone, whatever their width."""
    program = captured(ToyConfig(layers=1, dtype=dtype))
    result = run(program, Widen())
    assert result.changed == 0
    assert result.near_misses == ()
    assert program.parameter("lm_head.weight").dtype == dtype
    assert program.node("input_ids").meta["val"].dtype == torch.int64


def test_twice() -> None:
    assert ONE.dtype == torch.float32
    assert_settled(captured(HALF, Widen()), Widen())
