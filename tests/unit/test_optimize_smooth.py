"""SmoothQuant's scales: both largest values, over all tokens and all weights behind a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import bind_inputs, run_node
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.smooth import set_smoothing
from fptq_compiler.progress import SilentProgress
from fptq_compiler.transforms import Diagonal
from tests.passes.steps import transformed
from tests.toys import ToyConfig

BATCHES = [torch.arange(24).reshape(2, 12), torch.arange(30, 54).reshape(2, 12)]
LAYER = "model.layers.0"


def _normalised(program: Program) -> list[Tensor]:
    """(tokens, channels) of every norm, without gain."""
    found: dict[str, list[Tensor]] = {}
    for ids in BATCHES:
        environment = bind_inputs(program.module, program.arguments(ids), None)
        for node in program.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            environment[node] = run_node(program.module, node, environment, None)
            if node.target is ops.rms_norm:
                found.setdefault(node.name, []).append(environment[node].flatten(0, 1))
    return [torch.cat(parts) for parts in found.values()]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_the_scale_is_the_papers(alpha: float) -> None:
    plain = transformed(ToyConfig(), ())
    gain = next(e for e in plain.module.modules() if type(e).__name__ == "GainEdge").gain
    with torch.no_grad():
        activation = _normalised(plain)[0].abs().amax(0)
    weights = [plain.parameter(f"{LAYER}.self_attn.{p}_proj.weight") for p in "qkv"]
    weight = (torch.cat(weights) * gain).abs().amax(0)
    expected = activation**alpha / weight ** (1 - alpha)
    program = transformed(ToyConfig(), ("smooth",))
    set_smoothing(program, BATCHES, alpha, SilentProgress())
    transform = program.maps[f"smooth.{LAYER}.self_attn"]
    assert isinstance(transform, Diagonal)
    # float32: a power and its logarithm
    torch.testing.assert_close((-transform.log_scale).exp(), expected, rtol=1e-5, atol=0)


def test_other_maps_stay() -> None:
    program = transformed(ToyConfig(), ("smooth", "updown"))
    set_smoothing(program, BATCHES, 0.85, SilentProgress())
    for name, transform in program.maps.items():
        assert isinstance(transform, Diagonal)
        assert bool(transform.log_scale.any()) == name.startswith("smooth."), name


def test_without_such_maps_nothing_runs() -> None:
    program = transformed(ToyConfig(), ("updown",))
    set_smoothing(program, [], 0.85, SilentProgress())
