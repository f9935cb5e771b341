"""insert_smooth (SmoothQuant): a scale of each channel between a norm and its linears."""

from __future__ import annotations

from fptq_compiler.graph.inputs import input_node
from fptq_compiler.passes import insertion
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.passes.insert_smooth import InsertSmooth
from fptq_compiler.passes.insert_transforms import InsertResidual
from fptq_compiler.passes.untie_weights import UntieWeights
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

NAME = "smooth_model_layers_0_mlp"
READY = (FoldNorms(), InsertSmooth())

BEFORE = """
rms_norm_default_1 = fptq.rms_norm(add_2, None, 1e-05)
edges_gain_rms_norm_default_1_linear_5 = [edges.gain_rms_norm_default_1.linear_5]\
(%model.layers.0.mlp.up_proj.weight)
linear_5 = linear(rms_norm_default_1, edges_gain_rms_norm_default_1_linear_5)
"""

AFTER = """
rms_norm_default_1 = fptq.rms_norm(add_2, None, 1e-05)
online_smooth_model_layers_0_mlp = [online.smooth_model_layers_0_mlp](rms_norm_default_1)
edges_smooth_model_layers_0_mlp_0 = [edges.smooth_model_layers_0_mlp.0]\
(edges_gain_rms_norm_default_1_linear_5)
linear_5 = linear(online_smooth_model_layers_0_mlp, edges_smooth_model_layers_0_mlp_0)
"""

FROZEN = """
rms_norm_default_1 = fptq.rms_norm(add_2, %online.gain_online_smooth_model_layers_0_mlp, 1e-05)
linear_4 = linear(rms_norm_default_1, %model.layers.0.mlp.gate_proj.weight)
linear_5 = linear(rms_norm_default_1, %model.layers.0.mlp.up_proj.weight)
"""


def test_text() -> None:
    program = with_sites(ONE, FoldNorms())
    gain = "edges_gain_rms_norm_default_1_linear_5"
    assert pick(program, "rms_norm_default_1", gain, "linear_5") == BEFORE
    assert run(program, InsertSmooth()).changed == 2
    online, edge = f"online_{NAME}", f"edges_{NAME}_0"
    assert pick(program, "rms_norm_default_1", online, edge, "linear_5") == AFTER


def test_the_scale_becomes_the_norms_gain() -> None:
    program = with_sites(ONE, *READY, FoldTransforms())
    assert run(program, FreezeOnline()).changed == 2
    assert pick(program, "rms_norm_default_1", "linear_4", "linear_5") == FROZEN
    assert_settled(program, FreezeOnline())


def test_numbers() -> None:
    packed = ToyConfig(layers=1, packed_qkv="slice", packed_gate_up="slice", mlp_bias=True)
    for config in (ONE, packed):
        assert change(with_sites(config, FoldNorms()), InsertSmooth()) < EXACT


def test_numbers_behind_a_turned_stream() -> None:
    steps = (UntieWeights(), FoldNorms(), InsertResidual(1))
    assert change(with_sites(ONE, *steps), InsertSmooth()) < EXACT


def test_near_miss() -> None:
    """S_n takes the norms away, and no gain is left to take the scale in."""
    steps = insertion(("scaling",), seed=1, scaling_places=())
    program = with_sites(ONE, *steps)
    assert run(program, InsertSmooth()).changed == 0
    (site,) = program.sites.mlp
    misses = [m for m in program.near_misses if m.what == "smooth"]
    assert site.refused["smooth"] == misses[1].reason
    source = input_node(program.node("linear_5"))
    assert misses[1].reason == f"its projections read {source}, which is no norm with a gain"


def test_twice() -> None:
    assert_settled(with_sites(ONE, *READY), InsertSmooth())
