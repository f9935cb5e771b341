"""insert_kronecker (FlatQuant): a small product in front of every linear of a site."""

from __future__ import annotations

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.passes.insert_kronecker import InsertKronecker
from fptq_compiler.passes.insert_smooth import InsertSmooth
from fptq_compiler.passes.insert_transforms import (
    InsertHadamard,
    InsertResidual,
    InsertUpdown,
    InsertValue,
)
from fptq_compiler.passes.untie_weights import UntieWeights
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

ALL = InsertKronecker(1)
OUTPUT = "kronecker_output_model_layers_0_mlp"

BEFORE = """
linear_4 = linear(rms_norm_default_1, %model.layers.0.mlp.gate_proj.weight)
linear_5 = linear(rms_norm_default_1, %model.layers.0.mlp.up_proj.weight)
linear_6 = linear(mul_5, %model.layers.0.mlp.down_proj.weight)
"""

AFTER = """
linear_4 = linear(online_kronecker_model_layers_0_mlp, edges_kronecker_model_layers_0_mlp_0)
linear_5 = linear(online_kronecker_model_layers_0_mlp, edges_kronecker_model_layers_0_mlp_1)
online_kronecker_output_model_layers_0_mlp = [online.kronecker_output_model_layers_0_mlp](mul_5)
linear_6 = linear(online_kronecker_output_model_layers_0_mlp, \
edges_kronecker_output_model_layers_0_mlp_0)
"""

FROZEN = """
mix_3 = mix(mul_5, None, %online.factor_0_online_kronecker_output_model_layers_0_mlp, \
%online.factor_1_online_kronecker_output_model_layers_0_mlp)
linear_6 = linear(mix_3, %model.layers.0.mlp.down_proj.weight)
"""


def test_text() -> None:
    program = with_sites(ONE)
    linears = ("linear_4", "linear_5", "linear_6")
    assert pick(program, *linears) == BEFORE
    assert run(program, ALL).changed == 4
    assert pick(program, *linears[:2], f"online_{OUTPUT}", linears[2]) == AFTER
    sizes = {n: (m.A.size, m.B.size) for n, m in program.maps.items()}
    assert sizes == {
        "kronecker.model.layers.0.self_attn": (4, 6),
        "kronecker_output.model.layers.0.self_attn": (4, 8),  # heads and their channels
        "kronecker.model.layers.0.mlp": (4, 6),
        "kronecker_output.model.layers.0.mlp": (5, 8),
    }


def test_frozen_it_is_two_small_matmuls() -> None:
    program = with_sites(ONE, ALL, FoldTransforms())
    assert change(program, FreezeOnline()) < 1e-6  # factors are stored in float32
    assert pick(program, "mix_3", "linear_6") == FROZEN
    factors = [input_node(program.node("mix_3"), i) for i in (2, 3)]
    shapes = [program.parameter(str(node.target)).shape for node in factors]
    assert shapes == [(5, 5), (8, 8)]


def test_numbers() -> None:
    packed = ToyConfig(layers=1, packed_qkv="slice", packed_gate_up="slice", mlp_bias=True)
    for config in (ONE, packed, ToyConfig(layers=1, heads=1, kv_heads=1)):
        assert change(with_sites(config), ALL) < EXACT


def test_numbers_behind_all_others() -> None:
    steps = (
        UntieWeights(), FoldNorms(), InsertValue(1), InsertUpdown(), InsertHadamard(),
        InsertResidual(1), InsertSmooth(),
    )
    assert change(with_sites(ONE, *steps), ALL) < EXACT


def test_values_channels_are_mapped_where_that_costs_nothing() -> None:
    program = with_sites(ONE, InsertValue(1))
    assert change(program, ALL) < EXACT
    output = program.maps["kronecker_output.model.layers.0.self_attn"]
    assert output.describe() == "(Affine 4) ⊗ (Identity 8)"
    assert change(with_sites(ONE, InsertValue(1), ALL, FoldTransforms()), FreezeOnline()) < 1e-6


def test_near_miss() -> None:
    program = with_sites(ToyConfig(layers=1, mlp=41))
    assert run(program, ALL).changed == 2
    assert {n.partition(".")[0] for n in program.maps} == {"kronecker", "kronecker_output"}
    assert all(n.endswith("self_attn") for n in program.maps)
    (site,) = program.sites.mlp
    reason = "41 channels are no product of two orders from 2 to 512"
    assert site.refused["kronecker"] == reason
    (miss,) = (m for m in program.near_misses if m.what == "kronecker")
    assert 'toys.py", line' in miss.source


def test_twice() -> None:
    assert_settled(with_sites(ONE, ALL), ALL)
    assert_settled(with_sites(ToyConfig(layers=1, mlp=41), ALL), ALL)
