"""round_scales: what a file in half precision can hold, exactly."""

from __future__ import annotations

import pytest
import torch

from fptq_compiler.errors import PassError, UnsupportedModelError
from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import set_parameter
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.round_scales import RoundScales
from fptq_compiler.quant.modules import ActivationFakeQuantizer
from tests.passes.steps import ONE, assert_settled, pick, quantized, run
from tests.toys import make_tokens

UP = "model.layers.0.mlp.up_proj.weight"
INPUT = "activation_quantizers_rms_norm_default_1_frozen"

BEFORE = f"""
{INPUT} = fptq.fake_quantize(rms_norm_default_1, 0.030000000000000002, 121, 8, 'linear input')
"""
AFTER = f"""
{INPUT} = fptq.fake_quantize(rms_norm_default_1, 0.029998779296875, 121, 8, 'linear input')
"""


def _frozen(step: float = 0.03) -> Program:
    program = quantized(ONE)
    for record in program.activation_quantizers:
        module = program.module.get_submodule(record.module)
        assert isinstance(module, ActivationFakeQuantizer)
        module.set_range(torch.tensor(step), torch.tensor(120.75))
    for weight in program.weight_quantizers:
        module = program.module.get_submodule(weight.module)
        module.set_scale(torch.full_like(module.scale, 0.1))
    program.facts |= {"calibrated", "folded"}
    run(program, FreezeQuantizers())
    return program


def test_text() -> None:
    program = _frozen()
    before = pick(program, INPUT)
    assert run(program, RoundScales(torch.float16)).changed == 9 + 7
    assert pick(program, INPUT) == AFTER
    assert before != AFTER
    assert program.parameter(f"{UP}_scale").unique().tolist() == [0.0999755859375]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers(dtype: torch.dtype) -> None:
    """Every scale is a number of the type, near the old one; codes stay."""
    program = _frozen()
    ids = make_tokens(ONE, 2, 11)
    before, codes = program.run(ids), program.parameter(f"{UP}_codes").clone()
    run(program, RoundScales(dtype))
    scales = [torch.tensor(n.args[1]) for n in program.call_nodes(ops.fake_quantize)]
    scales.append(program.parameter(f"{UP}_scale"))
    half = torch.finfo(dtype).eps / 2
    for scale, old in zip(scales, [0.03] * 7 + [0.1], strict=True):
        assert torch.equal(scale, scale.to(dtype).float())
        assert float((scale / old - 1).abs().max()) <= half
    assert torch.equal(program.parameter(f"{UP}_codes"), codes)
    assert not torch.equal(program.run(ids), before)


@pytest.mark.parametrize("step", [1e-6, 7e4])
def test_near_miss_a_scale_that_float16_has_not(step: float) -> None:
    program = _frozen(step)
    with pytest.raises(UnsupportedModelError, match=r"has scales of .* --dtype float32"):
        run(program, RoundScales(torch.float16))


def test_near_miss_before_freezing() -> None:
    with pytest.raises(PassError, match="pass round_scales requires frozen"):
        run(quantized(ONE), RoundScales(torch.float16))


def test_near_miss_a_small_weight_scale_is_named() -> None:
    program = _frozen()
    set_parameter(program.module, f"{UP}_scale", torch.full((40,), 1e-7))
    with pytest.raises(UnsupportedModelError, match=rf"{UP}_scale has scales of 1e-07"):
        run(program, RoundScales(torch.float16))


def test_twice() -> None:
    program = _frozen()
    run(program, RoundScales(torch.float16))
    assert_settled(program, RoundScales(torch.float16))
