"""pack_projections: query, key and value of a cached attention come from one linear."""

from __future__ import annotations

import pytest
import torch

from fptq_compiler.graph import cache_ops, ops
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call
from fptq_compiler.optimize.calibrate import calibrate_activations, calibrate_weights
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.pack_projections import PackProjections
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.progress import SilentProgress
from tests.passes.steps import assert_settled, pick, run, with_sites
from tests.toys import ToyConfig, make_tokens

GROUPED = ToyConfig(layers=1, attention_bias=True)

X = "activation_quantizers_rms_norm_default_frozen"
ATTENTION = "%model.layers.0.self_attn"
BEFORE = f"""
linear_frozen = fptq.linear({X}, {ATTENTION}.q_proj.weight_codes, \
{ATTENTION}.q_proj.weight_scale, {ATTENTION}.q_proj.bias, 4, 0)
linear_1_frozen = fptq.linear({X}, {ATTENTION}.k_proj.weight_codes, \
{ATTENTION}.k_proj.weight_scale, {ATTENTION}.k_proj.bias, 4, 0)
linear_2_frozen = fptq.linear({X}, {ATTENTION}.v_proj.weight_codes, \
{ATTENTION}.v_proj.weight_scale, {ATTENTION}.v_proj.bias, 4, 0)
"""
AFTER = f"""
linear_2_frozen_qkv = fptq.linear({X}, {ATTENTION}.q_proj.weight_qkv_codes, \
{ATTENTION}.q_proj.weight_qkv_scale, {ATTENTION}.q_proj.weight_qkv_bias, 4, 0)
"""


def _frozen(config: ToyConfig, block: int = 0) -> Program:
    """The toy with a cache, weights and activations as integers."""
    place = PlaceQuantizers(
        weights=4, activations=8, cache=8, block=block, embedding_bits=8, head_bits=8,
        stored_cache=True,
    )
    program = with_sites(config, place)
    calibrate_weights(program, 2.0, SilentProgress())
    ids = make_tokens(config, 2, 9)
    calibrate_activations(program, [ids], p=2.0, sinks="none", progress=SilentProgress())
    program.facts |= {"calibrated", "folded"}
    run(program, FreezeQuantizers())
    run(program, AddCache(32))
    return program


def _core(program: Program) -> torch.fx.Node:
    (core,) = program.call_nodes(cache_ops.cached_attention)
    return core


def _logits(program: Program) -> torch.Tensor:
    return program.run(make_tokens(GROUPED, 2, 9))


def test_text() -> None:
    program = _frozen(GROUPED)
    names = ("linear_frozen", "linear_1_frozen", "linear_2_frozen")
    assert pick(program, *names) == BEFORE
    assert [getattr(a, "name", a) for a in _core(program).args[:3]] == list(names)
    assert run(program, PackProjections()).changed == 1
    assert pick(program, "linear_2_frozen_qkv") == AFTER
    packed = [getattr(a, "name", a) for a in _core(program).args[:3]]
    assert packed == ["linear_2_frozen_qkv", None, None]
    parameters = [r.parameter for r in program.weight_quantizers]
    assert parameters[0] == f"{ATTENTION[1:]}.q_proj.weight_qkv"
    assert parameters[1] == f"{ATTENTION[1:]}.o_proj.weight"


@pytest.mark.parametrize("bias", [True, False])
def test_numbers(bias: bool) -> None:
    """Every output channel is the sum that it was, in the order that it was."""
    program = _frozen(ToyConfig(layers=2, attention_bias=bias))
    before = _logits(program)
    assert run(program, PackProjections()).changed == 2
    after = _logits(program)
    # A matmul of another width may sum in another order: 1e-7, and no code lies that near a tie.
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


def test_scales_of_blocks_stay_apart() -> None:
    assert run(_frozen(GROUPED, block=32), PackProjections()).changed == 0


def test_a_projection_with_another_reader_stays_apart() -> None:
    program = _frozen(GROUPED)
    key = _core(program).args[1]
    assert isinstance(key, torch.fx.Node)
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    read = call(program.graph, output, torch.ops.aten.neg.default, (key,), like=key)
    output.args = ((*output.args[0], read),)  # type: ignore[misc]
    assert run(program, PackProjections()).changed == 0


def test_twice() -> None:
    program = _frozen(GROUPED)
    run(program, PackProjections())
    assert_settled(program, PackProjections())
    assert program.call_nodes(ops.linear)
