"""protect_first_position: row 0 is scaled in front of a quantiser and back behind its readers."""

from __future__ import annotations

import pytest

from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from tests.passes.steps import EXACT, assert_settled, logits, pick, run, span, with_sites
from tests.toys import ToyConfig

BIASED = ToyConfig(layers=1, attention_bias=True, mlp_bias=True)
QUANTIZER = "activation_quantizers_mul_5"  # in front of the down projection
PROTECT = ProtectFirstPosition({QUANTIZER: 0.25})

BEFORE = """
activation_quantizers_mul_5 = [activation_quantizers.mul_5](mul_5)
linear_6 = linear(activation_quantizers_mul_5, %model.layers.0.mlp.down_proj.weight, \
%model.layers.0.mlp.down_proj.bias)
add_3 = add(add_2, linear_6)
"""

FIRST = """
sym_size_int = sym_size.int(input_ids, 1)
arange_default = arange(sym_size_int)
eq_scalar = eq.Scalar(arange_default, 0)
to_dtype = to.dtype(eq_scalar, torch.float32)
unsqueeze_default = unsqueeze(to_dtype, -1)
"""

AFTER = """
mul_tensor = mul(unsqueeze_default, -0.75)
add_tensor = add(mul_tensor, 1.0)
mul_tensor_1 = mul(mul_5, add_tensor)
activation_quantizers_mul_5 = [activation_quantizers.mul_5](mul_tensor_1)
linear_6 = linear(activation_quantizers_mul_5, %model.layers.0.mlp.down_proj.weight)
mul_tensor_2 = mul(unsqueeze_default, 3.0)
add_tensor_1 = add(mul_tensor_2, 1.0)
mul_tensor_3 = mul(linear_6, add_tensor_1)
add_tensor_2 = add(mul_tensor_3, %model.layers.0.mlp.down_proj.bias)
add_3 = add(add_2, add_tensor_2)
"""


def _placed(activations: int = 8) -> Program:
    place = PlaceQuantizers(
        weights=16, activations=activations, cache=16, block=0, embedding_bits=16, head_bits=16
    )
    program = with_sites(BIASED, place)
    program.facts.add("calibrated")
    return program


def _make_transparent(program: Program) -> None:
    """Take every quantiser out, so that the rewrite stands alone."""
    for record in program.activation_quantizers:
        node = program.node(record.node)
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)


def test_text() -> None:
    program = _placed()
    assert span(program, QUANTIZER, "add_3") == BEFORE
    assert run(program, PROTECT).changed == 1
    assert span(program, "sym_size_int", "unsqueeze_default") == FIRST
    assert span(program, "mul_tensor", "add_3") == AFTER


def test_numbers() -> None:
    """Without the quantisers the function is the same, at every reader and with its bias."""
    program = _placed()
    every = {r.node: 2.0**-i for i, r in enumerate(program.activation_quantizers, start=1)}
    run(program, ProtectFirstPosition(every))
    _make_transparent(program)
    # Powers of two: even their products round nowhere, only the sum with the bias does.
    assert relative_error(logits(program), logits(with_sites(BIASED))) < EXACT
    assert ProtectFirstPosition.effect is Effect.APPROXIMATES


def test_only_row_0_is_scaled() -> None:
    program = _placed()
    run(program, PROTECT)
    assert pick(program, "eq_scalar") == "\neq_scalar = eq.Scalar(arange_default, 0)\n"


def test_near_miss() -> None:
    """No quantiser needs it: nothing is added. An unknown one is an error that names it."""
    program = _placed()
    assert run(program, ProtectFirstPosition({})).changed == 0
    program = _placed()
    with pytest.raises(KeyError, match="activation_quantizers_nowhere"):
        ProtectFirstPosition({"activation_quantizers_nowhere": 0.5}).run(program)


def test_twice() -> None:
    program = _placed()
    run(program, PROTECT)
    assert_settled(program, PROTECT)
