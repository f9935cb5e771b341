"""Calibration: ranges from what really flows, block by block, and first-token sinks."""

import pytest
import torch

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.calibrate import (
    Calibration,
    calibrate_activations,
    calibrate_weights,
    sink_factor,
)
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.progress import SilentProgress
from fptq_compiler.quant.grid import Grid
from fptq_compiler.quant.ranges import activation_range, channel_scale
from tests.passes.steps import quantized, with_sites
from tests.toys import ToyConfig

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def program() -> Program:
    return quantized(ToyConfig())


def calibrate(program: Program, sinks: str = "none") -> Calibration:
    batches = [row.unsqueeze(0) for row in IDS]
    return calibrate_activations(program, batches, p=2.0, sinks=sinks, progress=SilentProgress())


def float_values(program: Program) -> dict[str, torch.Tensor]:
    """What each quantiser reads in the float model, by module, from a run of the whole."""
    modules = {q.module for q in program.activation_quantizers}
    weights = {q.module for q in program.weight_quantizers}
    for path in modules | weights:
        program.module.get_submodule(path).forward = lambda x: x  # type: ignore[method-assign]
    found: dict[str, torch.Tensor] = {}

    def watch(node: torch.fx.Node, value: object) -> None:
        if node.target in modules:
            assert isinstance(value, torch.Tensor)
            found[str(node.target)] = value

    with torch.no_grad():
        evaluate.run(program.module, program.arguments(IDS), watch=watch)
    return found


def test_ranges_are_those_of_the_float_model(program: Program) -> None:
    calibrate(program)
    scales = {
        q.module: program.module.get_submodule(q.module).scale.item()
        for q in program.activation_quantizers
    }
    values = float_values(program)
    assert set(values) == set(scales)
    for path, value in values.items():
        scale, _ = activation_range(value, Grid(8, symmetric=False), 2.0)
        # batches of one against the batch of two: float32 sums in another order
        assert scales[path] == pytest.approx(scale.item(), rel=1e-3), path


def test_keys_and_values_may_have_a_scale_a_channel() -> None:
    place = PlaceQuantizers(
        weights=16, activations=16, cache=4, block=0, embedding_bits=16, head_bits=16,
        stored_cache=True, channel_scales=True,
    )
    program = with_sites(ToyConfig(), place)
    calibrate(program)
    modules = [program.module.get_submodule(q.module) for q in program.activation_quantizers]
    scales = [module.scale.clone() for module in modules]
    assert [scale.shape for scale in scales] == [(1, 2, 1, 8)] * 4
    for scale, value in zip(scales, float_values(program).values(), strict=True):
        expected = channel_scale(value, Grid(4, symmetric=True), 2.0)
        torch.testing.assert_close(scale, expected, rtol=1e-3, atol=0)


def test_every_weight_gets_a_scale_and_a_figure(program: Program) -> None:
    found = calibrate_weights(program, 2.0, SilentProgress())
    assert set(found) == {q.parameter for q in program.weight_quantizers}
    assert all(10 < value < 60 for value in found.values())  # 4 bits: 20 dB, 8 bits: 44 dB


def test_a_sink_is_a_first_position_far_wider_than_the_rest() -> None:
    values = torch.ones(2, 6, 3)
    assert sink_factor(values) == 1.0
    values[:, 0] = 100.0
    assert sink_factor(values) == 2.0**-7
    values[:, 1:] = 0.0
    assert sink_factor(values) == 1.0


def test_tokens_without_positions_have_no_sink() -> None:
    values = torch.ones(6, 4)
    values[:, 0] = 100.0  # a wide channel, not a wide position
    assert sink_factor(values) == 1.0
    assert sink_factor(values.unsqueeze(1)) == 1.0
    assert sink_factor(values.unsqueeze(0)) == 1.0


def test_sinks_get_a_factor_only_where_asked(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fptq_compiler.optimize.calibrate.sink_factor", lambda values: 0.25)
    assert calibrate(program, "none").first_position == {}
    found = calibrate(program, "first-position").first_position
    linear_inputs = [q for q in program.activation_quantizers if q.role == "linear input"]
    assert found == {q.node: 0.25 for q in linear_inputs}
