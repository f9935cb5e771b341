"""track_bias: while maps and scales move, every linear keeps the mean of its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.blocks import outline
from fptq_compiler.graph.edges import transformed
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.mean_shift import Means, MeanShift
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import off_identity, relative_error
from fptq_compiler.optimize.bypass import Bypass
from fptq_compiler.optimize.calibrate import calibrate_activations, calibrate_weights
from fptq_compiler.passes import insertion
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.track_bias import TrackBias
from fptq_compiler.progress import SilentProgress
from tests.passes.steps import assert_settled, pick, run, with_sites
from tests.toys import ToyConfig

PLAIN = ToyConfig(layers=1)
BIASED = ToyConfig(layers=1, attention_bias=True, mlp_bias=True, output_bias=True)
IDS = torch.arange(40).reshape(2, 20)
TRAINED = ("value", "prerope", "updown")

BEFORE = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, %model.layers.0.self_attn.o_proj.bias)
linear_4 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_gate_proj_weight)
"""
AFTER = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, mean_shifts_linear_3)
linear_4 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_gate_proj_weight, mean_shifts_linear_4)
"""


def calibrated(
    config: ToyConfig, transforms: tuple[str, ...] = (), block: int = 0
) -> tuple[Program, dict[str, Means]]:
    """A toy with quantisers, its trained maps on their edges, and the means of its inputs."""
    steps = insertion(transforms, seed=0, scaling_places=("down_proj",), hadamard_block=block)
    program = with_sites(config, *steps)
    maps = tuple(m for n, m in program.maps.items() if n.partition(".")[0] in TRAINED)
    run(program, FoldTransforms(maps))
    run(program, FreezeOnline())
    run(program, PlaceQuantizers(
        weights=4, activations=8, cache=16, block=0, embedding_bits=8, head_bits=8
    ))
    calibrate_weights(program, 2.0, SilentProgress())
    found = calibrate_activations(program, [IDS], p=2.0, sinks="none", progress=SilentProgress())
    return program, found.means


def test_text() -> None:
    program, means = calibrated(ToyConfig(layers=1, output_bias=True))
    names = ("linear_3", "linear_4")
    assert pick(program, *names) == BEFORE
    assert run(program, TrackBias(means)).changed == 7
    assert pick(program, *names) == AFTER


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_numbers(config: ToyConfig, block: int) -> None:
    """Wherever the maps are, the mean is that of the exact weight, whose input is turned too."""
    program, means = calibrated(config, (*TRAINED, "hadamard"), block)
    run(program, TrackBias(means))
    tracked = 0
    with moved(program), torch.no_grad():
        inputs = turned_means(program)
        for name in means:
            bias = program.node(name).args[2:]
            if not bias:
                continue  # the head
            shift = program.node(str(bias[0]))
            weight, rounded, *own = (value_of(program, n) for n in shift.all_input_nodes)
            module = program.module.get_submodule(str(shift.target))
            error = module.get_buffer("error")
            quantized = inputs[name] + error
            found = rounded.double() @ quantized + module(weight, rounded, *own).double()
            wanted = weight.double() @ inputs[name] + sum(own, torch.zeros(())).double()
            plain = rounded.double() @ quantized + sum(own, torch.zeros(())).double()
            scale = wanted.abs().max()
            assert (found - wanted).abs().max() <= 1e-5 * scale  # float32
            assert (plain - wanted).abs().max() > 1e-3 * scale
            tracked += 1
    assert tracked == 7


def test_near_miss() -> None:
    """The head keeps to its weights, and a linear whose mean nobody knows stays as it is."""
    program, means = calibrated(PLAIN)
    known = {n: m for n, m in means.items() if n != "linear_4"}
    assert run(program, TrackBias(known)).changed == 6
    assert len(program.node("linear_7").args) == 2
    assert len(program.node("linear_4").args) == 2


def test_run_twice() -> None:
    program, means = calibrated(PLAIN)
    track = TrackBias(means)
    run(program, track)
    assert_settled(program, track)


def test_without_quantisers_it_is_the_original_off_identity() -> None:
    original = with_sites(BIASED).run(IDS)
    program, means = calibrated(BIASED, (*TRAINED, "hadamard"))
    run(program, TrackBias(means))
    with moved(program):
        assert relative_error(bypassed(program), original) < 1e-5  # float32


def test_gradients_reach_scales_and_maps() -> None:
    program, means = calibrated(PLAIN, TRAINED)
    run(program, TrackBias(means))
    shift = program.node("mean_shifts_linear_3")  # o_proj: its input is turned by T_v
    module = program.module.get_submodule(str(shift.target))
    assert isinstance(module, MeanShift)
    record = next(q for q in program.weight_quantizers if "o_proj" in q.parameter)
    quantizer = program.module.get_submodule(record.module)
    weight = transformed(program, input_node(shift))
    module(weight, quantizer(weight)).square().sum().backward()
    assert float(quantizer.scale.grad.abs().max()) > 0
    assert all(float(p.grad.abs().max()) > 0 for p in module.edges.parameters())


@contextmanager
def moved(program: Program) -> Iterator[None]:
    """The trained maps off identity; what is computed online is frozen and stays."""
    online = {name: program.maps[name] for name in [*program.maps] if "hadamard" in name}
    for name in online:
        del program.maps[name]
    with off_identity(program, 1):
        yield
    program.maps.update(online)


def value_of(program: Program, node: torch.fx.Node) -> Tensor:
    """A weight or bias, through edges and quantisers."""
    quantizers = {q.module for q in program.weight_quantizers}
    if node.target in quantizers:
        found: Tensor = program.module.get_submodule(str(node.target))(
            value_of(program, input_node(node))
        )
        return found
    return transformed(program, node)


def turned_means(program: Program) -> dict[str, Tensor]:
    """By linear, the mean of its exact input as a float run gives it now, as calibration does."""
    found: dict[str, Tensor] = {}

    def look(node: torch.fx.Node, values: evaluate.Environment) -> None:
        if node.target is torch.ops.aten.linear.default:
            found[node.name] = values[input_node(node)][:, 1:].flatten(0, -2).double().mean(0)

    _float_run(program, look)
    return found


def bypassed(program: Program) -> Tensor:
    """Logits without quantisers and without shifts."""
    values = _float_run(program, lambda *_: None)
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    logits = values[output.all_input_nodes[0]]
    assert isinstance(logits, Tensor)
    return logits


@torch.no_grad()
def _float_run(program: Program, look: object) -> evaluate.Environment:
    step = Bypass(program)
    values = evaluate.bind_inputs(program.module, program.arguments(IDS), None)
    for block in outline(program):
        for node in block.nodes:
            assert callable(look)
            look(node, values)
            values[node] = step(node, values)
    return values
