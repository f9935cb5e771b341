"""correct_bias: every quantised linear gets the bias that keeps its mean output."""

from __future__ import annotations

import torch
from torch import Tensor

from fptq_compiler.graph.mean_shift import Means
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.calibrate import calibrate_activations, calibrate_weights
from fptq_compiler.optimize.mean_shift import mean_shifts
from fptq_compiler.passes.correct_bias import CorrectBias
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.progress import SilentProgress
from fptq_compiler.quant.modules import WeightFakeQuantizer
from tests.passes.steps import assert_settled, pick, run, with_sites
from tests.toys import ToyConfig

CONFIG = ToyConfig(layers=1, output_bias=True)
IDS = torch.arange(40).reshape(2, 20)

BEFORE = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, %model.layers.0.self_attn.o_proj.bias)
linear_4 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_gate_proj_weight)
"""

AFTER = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, \
%model.layers.0.self_attn.o_proj.weight_bias)
linear_4 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_gate_proj_weight, \
%model.layers.0.mlp.gate_proj.weight_bias)
"""


def _calibrated() -> tuple[Program, dict[str, Means]]:
    place = PlaceQuantizers(
        weights=4, activations=4, cache=16, block=0, embedding_bits=8, head_bits=8
    )
    program = with_sites(CONFIG, FoldTransforms(), place)
    calibrate_weights(program, 2.0, SilentProgress())
    found = calibrate_activations(
        program, [IDS], p=2.0, sinks="none", progress=SilentProgress()
    )
    return program, found.means


def _weights(program: Program, linear: str) -> tuple[Tensor, Tensor]:
    """The float64 weight of a linear, exact and on its grid."""
    edge = program.node(linear).args[1]
    record = next(q for q in program.weight_quantizers if q.module == edge.target)
    module = program.module.get_submodule(record.module)
    assert isinstance(module, WeightFakeQuantizer)
    weight = program.parameter(record.parameter)
    return weight.double(), module(weight).detach().double()


def _correction(program: Program, means: dict[str, Means]) -> CorrectBias:
    return CorrectBias(mean_shifts(program, means))


def test_text() -> None:
    program, means = _calibrated()
    names = ("linear_3", "linear_4")
    assert pick(program, *names) == BEFORE
    assert run(program, _correction(program, means)).changed == 7
    assert pick(program, *names) == AFTER


def test_numbers() -> None:
    """The mean output is the float model's: E[x] W + b = E[x̂] Ŵ + b'."""
    program, means = _calibrated()
    old = {n: program.node(n).args[2:] for n in means}
    biases = {n: program.parameter(str(b[0].target)).double() for n, b in old.items() if b}
    run(program, _correction(program, means))
    for name, (exact, quantized) in means.items():
        weight, on_grid = _weights(program, name)
        new = program.node(name).args[2:]
        if not new:
            continue  # the head
        wanted = weight @ exact + biases.get(name, 0.0)
        found = on_grid @ quantized + program.parameter(str(new[0].target)).double()
        plain = on_grid @ quantized + biases.get(name, 0.0)
        # the bias is stored in float32
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_near_miss() -> None:
    """The head keeps to its weights, and a linear whose mean nobody knows stays as it is."""
    program, means = _calibrated()
    assert "linear_7" in means
    known = {n: m for n, m in means.items() if n != "linear_4"}
    assert run(program, _correction(program, known)).changed == 6
    assert len(program.node("linear_7").args) == 2
    assert len(program.node("linear_4").args) == 2


def test_run_twice() -> None:
    program, means = _calibrated()
    correct = _correction(program, means)
    run(program, correct)
    assert_settled(program, correct)
