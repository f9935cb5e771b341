"""canonicalize: wrappers are inlined, what changes nothing goes, what changes much is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.program import Program
from fptq_compiler.passes.canonicalize import Canonicalize
from tests.passes.steps import ONE, assert_settled, captured, change, exported_module, run


class Wrapped(nn.Module):
    """All that torch.export leaves between operators, in one small forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(61, 4)
        self.table.weight.data = torch.arange(61 * 4.0).view(61, 4).cos()

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.table(ids)
        with torch.no_grad():
            cosine = torch.cos(x * 2)
            sine = torch.sin(cosine)
        x = functional.dropout(x.contiguous() * cosine + sine, 0.5, training=self.training)
        x = x[:, :, :].clone().float()
        return x[..., 1:].double()


def _program(module: nn.Module) -> Program:
    return exported_module(module, torch.zeros(2, 7, dtype=torch.long))


BEFORE = """\
ids = input
embedding = embedding(%table.weight, ids)
wrap_with_set_grad_enabled = wrap_with_set_grad_enabled(False, %submod_1, embedding)
cos = getitem(wrap_with_set_grad_enabled, 0)
sin = getitem(wrap_with_set_grad_enabled, 1)
mul_1 = mul(embedding, cos)
add = add(mul_1, sin)
dropout = dropout(add, 0.5, False)
slice_1 = slice(dropout, 0, 0, 9223372036854775807)
clone = clone(slice_1)
"""

AFTER = """\
ids = input
embedding = embedding(%table.weight, ids)
mul = mul(embedding, 2)
cos_1 = cos(mul)
sin_1 = sin(cos_1)
mul_1 = mul(embedding, cos_1)
add = add(mul_1, sin_1)
slice_2 = slice(add, 2, 1, 9223372036854775807)
to_1 = to.dtype(slice_2, torch.float64)
return [to_1]
"""


def test_text() -> None:
    program = _program(Wrapped().eval())
    assert dump(program.module).startswith(BEFORE)
    run(program, Canonicalize())
    assert dump(program.module) == AFTER


def test_numbers() -> None:
    module = Wrapped().eval()
    program = _program(module)
    ids = torch.arange(10).view(2, 5)
    run(program, Canonicalize())
    # No tolerance: the same operators on the same values.
    assert torch.equal(program.run(ids), module(ids))
    assert change(captured(ONE), Canonicalize()) == 0


class Halves(nn.Module):
    """A table cut in two by a number of chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.table, self.chunks = nn.Embedding(10, 6), chunks

    def forward(self, ids: Tensor) -> Tensor:
        first, *_, last = self.table(ids).chunk(self.chunks, -1)
        return first[..., :1] - last[..., :1]


@pytest.mark.parametrize(("chunks", "sizes"), [(2, "[3, 3]"), (3, "[2, 2, 2]"), (4, "")])
def test_chunks_of_known_size_are_a_split(chunks: int, sizes: str) -> None:
    """Four chunks of six are three; that stays as it is."""
    program = _program(Halves(chunks))
    ids = torch.arange(10).view(2, 5)
    before = program.run(ids)
    run(program, Canonicalize())
    assert (f"split_with_sizes(embedding, {sizes}, -1)" in dump(program.module)) == bool(sizes)
    assert torch.equal(program.run(ids), before)


def test_near_miss_a_change_in_place_is_refused() -> None:
    program = captured(ONE)
    product = program.node("mul_5")
    product.target = torch.ops.aten.mul_.Tensor
    with pytest.raises(UnsupportedModelError) as caught:
        Canonicalize().run(program)
    message = str(caught.value)
    assert message.startswith("node mul_5 (aten.mul_.Tensor) changes a tensor in place")
    assert 'toys.py", line' in message
    assert message.endswith("write what must be kept outside forward.")


def test_near_miss_a_model_in_training_is_refused() -> None:
    program = _program(Wrapped().train())
    with pytest.raises(UnsupportedModelError) as caught:
        Canonicalize().run(program)
    message = str(caught.value)
    assert message.startswith("node dropout (aten.dropout.default) draws random numbers")
    assert 'test_canonicalize.py", line' in message
    assert message.endswith("Call model.eval() before torch.export.export.")


def test_twice() -> None:
    program = _program(Wrapped().eval())
    run(program, Canonicalize())
    assert_settled(program, Canonicalize())
    assert_settled(captured(ONE, Canonicalize()), Canonicalize())
