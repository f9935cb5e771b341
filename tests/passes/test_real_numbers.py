"""real_numbers: RoPE in complex numbers becomes RoPE in pairs of real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.program import Program
from fptq_compiler.passes.canonicalize import Canonicalize
from fptq_compiler.passes.real_numbers import RealNumbers
from tests.passes.steps import EXACT, assert_settled, change, exported_module, run

IDS = torch.arange(14).reshape(2, 7)
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


class Turned(nn.Module):
    """Rows of a table (B, S, 8) as four complex numbers each, turned by their position."""

    freqs_cis: Tensor

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn = turn
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(61, 8, generator=generator))
        angles = torch.outer(torch.arange(64.0), 10.0 ** -torch.arange(4.0))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("angles", angles)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        return self.turn(x, self.freqs_cis[: x.shape[1]], self.angles[: x.shape[1]])


def numbers(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def plain(x: Tensor, freqs: Tensor, _: Tensor) -> Tensor:
    return torch.view_as_real(numbers(x) * freqs).flatten(-2)


def reshaped(x: Tensor, freqs: Tensor, _: Tensor) -> Tensor:
    """As in Meta's reference, with heads: the table is viewed as (1, S, 1, D / 2)."""
    heads = numbers(x.unflatten(-1, (2, 4)))
    table = freqs.reshape(freqs.shape[0], 2, 2)[:, :1].unsqueeze(0)
    return torch.view_as_real(heads * table).flatten(2)


def made(x: Tensor, _: Tensor, angles: Tensor) -> Tensor:
    """The numbers are made in the graph, exchanged and read apart."""
    table = torch.polar(torch.ones_like(angles), angles).transpose(0, 1)
    turned = numbers(x).permute(0, 2, 1) * table * 0.5
    return torch.cat((turned.real, turned.imag), 1).mean(1, keepdim=True)


def with_length(x: Tensor, freqs: Tensor, _: Tensor) -> Tensor:
    return (numbers(x) * freqs).abs()


def prepared(turn: Turn) -> Program:
    return exported_module(Turned(turn), IDS, Canonicalize())


def complexes(program: Program) -> int:
    values = [n.meta.get("val") for n in program.graph.nodes]
    return sum(isinstance(v, Tensor) and v.is_complex() for v in values)


AFTER = """
slice_tensor = slice(%freqs_cis, 0, None, sym_size_int_3)
reshape = reshape(embedding, [sym_size_int_2, sym_size_int_3, -1, 2])
select_int = select.int(reshape, -1, 0)
select_int_1 = select.int(reshape, -1, 1)
select_int_2 = select.int(slice_tensor, -1, 0)
select_int_3 = select.int(slice_tensor, -1, 1)
mul_tensor = mul(select_int, select_int_2)
mul_tensor_1 = mul(select_int_1, select_int_3)
sub_tensor = sub(mul_tensor, mul_tensor_1)
mul_tensor_2 = mul(select_int, select_int_3)
mul_tensor_3 = mul(select_int_1, select_int_2)
add_tensor = add(mul_tensor_2, mul_tensor_3)
stack_default = stack([sub_tensor, add_tensor], -1)
"""


def test_text() -> None:
    program = prepared(plain)
    assert "view_as_complex" in dump(program.module)
    run(program, RealNumbers())
    text = dump(program.module)
    start = text.index("slice_tensor")
    assert text[start - 1 : text.index("flatten")].startswith(AFTER)
    assert program.parameter("freqs_cis").shape == (64, 4, 2)


@pytest.mark.parametrize("turn", [plain, reshaped, made])
def test_numbers(turn: Turn) -> None:
    program = prepared(turn)
    assert complexes(program) > 0
    assert change(program, RealNumbers()) < EXACT
    assert complexes(program) == 0
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    found = output.all_input_nodes[0].meta["val"].shape
    assert all(isinstance(size, torch.SymInt) for size in found[: 1 + (turn is not made)])


def test_near_miss() -> None:
    """The absolute value has no form in pairs here: nothing is rewritten."""
    program = prepared(with_length)
    before = dump(program.module)
    assert run(program, RealNumbers()).changed == 0
    assert dump(program.module) == before


def test_twice() -> None:
    program = prepared(reshaped)
    run(program, RealNumbers())
    assert_settled(program, RealNumbers())
