"""GPTQ of a model: every weight is rounded on the inputs that the rounded model gives it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph import evaluate, ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.calibrate import (
    Calibration,
    calibrate_activations,
    calibrate_weights,
    token_mean,
)
from fptq_compiler.optimize.mean_shift import LINEAR
from fptq_compiler.optimize.round_weights import Rounding, round_weights
from fptq_compiler.passes.correct_bias import CorrectBias
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from fptq_compiler.passes.settle_bias import SettleBias
from fptq_compiler.progress import SilentProgress
from fptq_compiler.quant.gptq import gptq
from fptq_compiler.quant.modules import WeightFakeQuantizer
from fptq_compiler.recipe import TrainingRecipe
from fptq_compiler.report import Report
from fptq_compiler.stages.quantizing import find_ranges
from tests.compiling import BIASED, compile_toy, quick, run_onnx
from tests.passes.steps import run, with_sites
from tests.toys import ToyConfig, make_tokens

CONFIG = ToyConfig(attention_bias=True, hidden=32, mlp=48)
IDS = torch.arange(60).reshape(3, 20)
HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"


class Rounded:
    """A toy whose ranges are found and whose weights are rounded, the float weights beside it."""

    def __init__(
        self, *, head: int = 8, block: int = 0, sinks: str = "none", correct_bias: bool = False
    ) -> None:
        place = PlaceQuantizers(
            weights=4, activations=8, cache=8, block=block, embedding_bits=8, head_bits=head
        )
        self.program = with_sites(CONFIG, FoldTransforms(), place)
        calibrate_weights(self.program, 2.0, SilentProgress())
        self.exact = {
            q.parameter: self.program.parameter(q.parameter).clone()
            for q in self.program.weight_quantizers
        }
        self.found = calibrate_activations(
            self.program, [IDS], p=2.0, sinks=sinks, progress=SilentProgress()
        )
        self.rounding = rounded(self.program, self.found, correct_bias=correct_bias)

    def quantizer(self, parameter: str) -> WeightFakeQuantizer:
        record = next(q for q in self.program.weight_quantizers if q.parameter == parameter)
        module = self.program.module.get_submodule(record.module)
        assert isinstance(module, WeightFakeQuantizer)
        return module

    def apply(self, *steps: Pass) -> None:
        for step in steps:
            run(self.program, step)


def rounded(program: Program, found: Calibration, *, correct_bias: bool = False) -> Rounding:
    return round_weights(
        program, [IDS], found, correct_bias=correct_bias, progress=SilentProgress()
    )


def values(program: Program, nodes: list[Node]) -> dict[Node, Tensor]:
    """What these nodes give in a run of the whole program."""
    found: dict[Node, Tensor] = {}

    def watch(node: Node, value: object) -> None:
        if node in nodes:
            assert isinstance(value, Tensor)
            found[node] = value

    with torch.no_grad():
        evaluate.run(program.module, program.arguments(IDS), watch=watch)
    return found


@pytest.mark.parametrize("sinks", ["none", "first-position"])
@pytest.mark.parametrize("block", [0, 32])
def test_weights_are_those_of_gptq_on_the_final_inputs(
    monkeypatch: pytest.MonkeyPatch, sinks: str, block: int
) -> None:
    """The inputs that the finished program gives its linears are those that they were made for."""
    monkeypatch.setattr("fptq_compiler.optimize.calibrate.sink_factor", lambda values: 0.25)
    toy = Rounded(head=4, sinks=sinks, block=block)
    toy.apply(ProtectFirstPosition(toy.found.first_position))
    linears = toy.program.call_nodes(LINEAR)
    inputs = values(toy.program, [input_node(node) for node in linears])
    assert len(linears) == len(toy.rounding.sqnr) == 15
    for node in linears:
        parameter = str(input_node(input_node(node, 1)).target)
        rows = inputs[input_node(node)].flatten(0, -2)
        H = rows.t() @ rows * (2 / len(rows))
        module, W = toy.quantizer(parameter), toy.exact[parameter]
        expected = gptq(W, H, module.scale.detach(), module.granularity, module.grid)
        assert torch.equal(toy.program.parameter(parameter), expected), parameter
        assert not torch.equal(expected, module(W)), parameter


def test_frozen_codes_are_those_of_gptq() -> None:
    """Bit for bit: nearest rounding of what stands in the program changes nothing."""
    toy = Rounded()
    on_grid = {name: toy.program.parameter(name).clone() for name in toy.rounding.sqnr}
    toy.apply(FreezeQuantizers())
    frozen = {str(input_node(n, 1).target): n for n in toy.program.call_nodes(ops.linear)}
    for name, expected in on_grid.items():
        scale = input_node(frozen[f"{name}_codes"], 2)
        codes = toy.program.parameter(f"{name}_codes")
        assert torch.equal((codes * toy.program.parameter(str(scale.target))).t(), expected)


def test_every_mean_output_is_that_of_the_float_model() -> None:
    """With all rounding errors of the layers before: E[x̂] Ŵ + b' = E[x] W + b."""
    toy = Rounded(correct_bias=True)
    linears = toy.program.call_nodes(LINEAR)[:-1]  # without the head
    wanted = {}
    for node in linears:
        W = toy.exact[str(input_node(input_node(node, 1)).target)].double()
        wanted[node] = W @ toy.found.means[node.name][0]
        if len(node.args) > 2:
            wanted[node] += toy.program.parameter(str(input_node(node, 2).target)).double()
    plain = values(toy.program, linears)
    toy.apply(CorrectBias(toy.rounding.shifts))
    found = values(toy.program, linears)
    for node, mean in wanted.items():
        # biases are stored in float32, and a near tie at a quantiser may fall to the other side
        assert (token_mean(found[node]) - mean).abs().max() < 1e-3 * mean.abs().max()
        assert (token_mean(plain[node]) - mean).abs().max() > 1e-2 * mean.abs().max()


def test_what_a_bias_makes_up_for_is_no_error_of_the_weights() -> None:
    """Where the mean is corrected the Hessian is that of x - E[x], without position 0 in E[x]."""
    toy = Rounded(correct_bias=True)
    toy.apply(CorrectBias(toy.rounding.shifts))
    linears = toy.program.call_nodes(LINEAR)[:-1]
    inputs = values(toy.program, [input_node(node) for node in linears])
    for node in linears:
        parameter = str(input_node(input_node(node, 1)).target)
        x = inputs[input_node(node)]
        rows = (x.double() - token_mean(x)).flatten(0, -2)
        H = rows.t() @ rows * (2 / len(rows))
        module, W = toy.quantizer(parameter), toy.exact[parameter]
        expected = gptq(W, H, module.scale.detach(), module.granularity, module.grid)
        found = toy.program.parameter(parameter)
        # the sums behind H are float32 there: a target on the tie of two codes may fall either way
        assert (found != expected).float().mean() < 0.01, parameter


def test_tables_of_eight_bits_are_left_alone() -> None:
    toy = Rounded()
    assert HEAD not in toy.rounding.sqnr
    for name in (HEAD, TABLE):
        assert torch.equal(toy.program.parameter(name), toy.exact[name])


def test_it_is_deterministic() -> None:
    first, second = (Rounded(correct_bias=True) for _ in range(2))
    assert first.rounding.sqnr == second.rounding.sqnr
    for name in first.exact:
        assert torch.equal(first.program.parameter(name), second.program.parameter(name))


def test_inputs_that_are_not_finite_are_refused() -> None:
    toy = Rounded()
    toy.program.parameter("model.layers.0.self_attn.o_proj.weight").fill_(torch.nan)
    with pytest.raises(OptimizationError, match=r"inputs of linear_4 cannot be used: H must be"):
        rounded(toy.program, toy.found)


@pytest.mark.parametrize("setting", ["4-8-8", "4-16-16/32"])
def test_the_file_computes_what_the_rounded_program_does(setting: str, tmp_path: Path) -> None:
    recipe = quick(setting)
    to_nearest = replace(recipe, weights=replace(recipe.weights, rounding="nearest"))
    compiled = compile_toy(BIASED, recipe, tmp_path / "gptq.onnx")
    nearest = compile_toy(BIASED, to_nearest, tmp_path / "nearest.onnx")
    assert "round weights" in [row.name for row in compiled.report.stages]
    assert "GPTQ rounded 7 weights" in compiled.report.decisions
    ids = make_tokens(BIASED, 2, 16)
    found = run_onnx(compiled.path, ids)
    exact = compiled.program.run(ids)
    assert (found - exact).abs().max() < 1e-3 * exact.abs().max()
    assert (found - nearest.program.run(ids)).abs().max() > 1e-2 * exact.abs().max()


def ready_to_train(weights: str) -> Program:
    """A toy rounded by GPTQ as the stages that train take it."""
    program = with_sites(CONFIG, FoldTransforms())
    recipe = quick("4-8-8", training=TrainingRecipe(weights=weights))
    recipe = replace(recipe, weights=replace(recipe.weights, rounding="gptq"))
    silent = SilentProgress()
    find_ranges(program, recipe, IDS, Report(origin="toy"), silent, trained=True)
    return program


def linear_quantizers(program: Program) -> dict[str, WeightFakeQuantizer]:
    """By weight, of all linears but the head."""
    records = [q for q in program.weight_quantizers if q.role == "linear"]
    modules = {q.parameter: program.module.get_submodule(q.module) for q in records}
    return {name: m for name, m in modules.items() if isinstance(m, WeightFakeQuantizer)}


def test_training_moves_the_scales_and_keeps_the_codes() -> None:
    program = ready_to_train("none")
    quantizers = linear_quantizers(program)
    codes = {name: q.codes(program.parameter(name)) for name, q in quantizers.items()}
    before = program.run(IDS)
    for quantizer in quantizers.values():
        quantizer.set_scale(quantizer.scale * 1.3)
    assert (program.run(IDS) - before).abs().max() > 1e-2 * before.abs().max()
    run(program, SettleBias())
    run(program, FreezeQuantizers())
    assert len(codes) == 14
    for name, expected in codes.items():
        assert torch.equal(program.parameter(f"{name}_codes").t(), expected)


def test_a_trained_correction_moves_the_codes() -> None:
    """What is added to a weight can only be rounded with it."""
    for quantizer in linear_quantizers(ready_to_train("lora")).values():
        assert quantizer.coded_with is None


def test_a_scale_moves_no_mean() -> None:
    """The biases of kept codes follow: what a larger scale adds to a mean they take back."""
    program = ready_to_train("none")
    node = program.node("linear_3")
    before = token_mean(values(program, [node])[node])
    quantizer = linear_quantizers(program)[str(input_node(input_node(node, 1)).target)]
    quantizer.set_scale(quantizer.scale * 1.3)
    after = token_mean(values(program, [node])[node])
    drift = (after - before).abs().max()
    shift = program.node(str(node.args[2]))
    program.module.get_submodule(str(shift.target)).get_buffer("mean").zero_()
    unheld = (token_mean(values(program, [node])[node]) - before).abs().max()
    assert drift < 0.2 * unheld
