"""scale_outputs: while the scales of kept codes are trained, they multiply a linear's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import set_parameter
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.optimize.calibrate import calibrate_activations, calibrate_weights
from fptq_compiler.optimize.student import Student
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from fptq_compiler.passes.scale_outputs import ScaleOutputs
from fptq_compiler.passes.track_bias import TrackBias
from fptq_compiler.progress import SilentProgress
from fptq_compiler.quant.modules import WeightFakeQuantizer
from tests.passes.steps import assert_settled, pick, run, with_sites
from tests.passes.test_track_bias import BIASED, IDS, PLAIN
from tests.toys import ToyConfig

BEFORE = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, mean_shifts_linear_3)
"""
AFTER = """
linear_3 = linear(activation_quantizers_flatten, %model.layers.0.self_attn.o_proj.weight)
output_scales_linear_3 = [output_scales.linear_3](linear_3)
add_tensor_7 = add(output_scales_linear_3, scaled_shifts_mean_shifts_linear_3)
"""


def coded(config: ToyConfig, *, block: int = 0, tracked: bool = True) -> Program:
    """A toy whose weights are codes that stay, with other scales than they were coded with."""
    program = with_sites(config, FoldTransforms(), PlaceQuantizers(
        weights=4, activations=8, cache=16, block=block, embedding_bits=8, head_bits=8
    ))
    calibrate_weights(program, 2.0, SilentProgress())
    found = calibrate_activations(program, [IDS], p=2.0, sinks="none", progress=SilentProgress())
    generator = torch.Generator().manual_seed(3)
    for quantizer, parameter in quantizers(program):
        weight = quantizer(program.parameter(parameter)).detach()
        set_parameter(program.module, parameter, weight)
        quantizer.keep_codes()
        factors = 1.0 + 0.1 * torch.rand(quantizer.scale.shape, generator=generator)
        quantizer.set_scale(quantizer.scale * factors)
    if tracked:
        run(program, TrackBias(found.means))
    sink = next(q.node for q in program.activation_quantizers if q.role == "linear input")
    run(program, ProtectFirstPosition({sink: 0.5}))
    return program


def quantizers(program: Program) -> list[tuple[WeightFakeQuantizer, str]]:
    found = []
    for record in program.weight_quantizers:
        module = program.module.get_submodule(record.module)
        assert isinstance(module, WeightFakeQuantizer)
        if record.role == "linear":
            found.append((module, record.parameter))
    return found


def gradients(program: Program, scales: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of these scales, as training sees them."""
    for scale in scales:
        scale.grad = None
        scale.requires_grad_(True)
    logits = Student(program, scales)(IDS)
    logits.square().mean().backward()
    return logits.detach(), [scale.grad for scale in scales if scale.grad is not None]


def test_text() -> None:
    program = coded(PLAIN)
    assert pick(program, "linear_3") == BEFORE
    assert run(program, ScaleOutputs()).changed == 7
    assert pick(program, "linear_3", "output_scales_linear_3", "add_tensor_7") == AFTER


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_numbers(config: ToyConfig, tracked: bool) -> None:
    """Values and gradients are those of the scaled weight, also behind a protected position."""
    program = coded(config, tracked=tracked)
    scales = [quantizer.scale for quantizer, _ in quantizers(program)]
    expected, wanted = gradients(program, scales)
    run(program, ScaleOutputs())
    logits, found = gradients(program, scales)
    assert relative_error(logits, expected) < 1e-5  # float32
    assert len(found) == len(wanted) == 7
    for mine, theirs in zip(found, wanted, strict=True):
        assert float(theirs.abs().max()) > 0.0
        assert relative_error(mine, theirs) < 1e-4


def test_near_miss() -> None:
    """Scales of blocks of columns stay on the weight, as do weights that are rounded anew."""
    assert run(coded(PLAIN, block=32), ScaleOutputs()).changed == 0
    program = coded(PLAIN)
    anew, _ = quantizers(program)[0]
    anew.coded_with = None
    assert run(program, ScaleOutputs()).changed == 6


def test_run_twice() -> None:
    program = coded(BIASED)
    run(program, ScaleOutputs())
    assert_settled(program, ScaleOutputs())
