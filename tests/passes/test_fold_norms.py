"""fold_norms: the gain of a norm goes into the linears that read it."""

from __future__ import annotations

from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.fold_transforms import FoldTransforms
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, span, with_sites
from tests.toys import ToyConfig

PATH = "model.layers.0"

BEFORE = f"""
rms_norm_default_1 = fptq.rms_norm(add_2, %{PATH}.post_attention_layernorm.weight, 1e-05)
linear_4 = linear(rms_norm_default_1, %{PATH}.mlp.gate_proj.weight)
linear_5 = linear(rms_norm_default_1, %{PATH}.mlp.up_proj.weight)
"""

AFTER = f"""
rms_norm_default_1 = fptq.rms_norm(add_2, None, 1e-05)
edges_gain_rms_norm_default_1_linear_4 = \
[edges.gain_rms_norm_default_1.linear_4](%{PATH}.mlp.gate_proj.weight)
linear_4 = linear(rms_norm_default_1, edges_gain_rms_norm_default_1_linear_4)
edges_gain_rms_norm_default_1_linear_5 = \
[edges.gain_rms_norm_default_1.linear_5](%{PATH}.mlp.up_proj.weight)
linear_5 = linear(rms_norm_default_1, edges_gain_rms_norm_default_1_linear_5)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert span(program, "rms_norm_default_1", "linear_5") == BEFORE
    assert run(program, FoldNorms()).changed == 3
    assert span(program, "rms_norm_default_1", "linear_5") == AFTER


def test_numbers() -> None:
    assert change(with_sites(ONE), FoldNorms()) < EXACT


def test_the_gain_multiplies_the_columns() -> None:
    program = with_sites(ONE)
    weight = program.parameter(f"{PATH}.mlp.up_proj.weight").double()
    gain = program.parameter(f"{PATH}.post_attention_layernorm.weight").double()
    run(program, FoldNorms())
    run(program, FoldTransforms())
    # No tolerance: both round the float64 product once.
    assert program.parameter(f"{PATH}.mlp.up_proj.weight").equal((weight * gain[None]).float())


def test_near_miss_a_tied_head() -> None:
    """The last gain cannot go into a head that is also the embedding; T_r and S_n need it to."""
    program = with_sites(ToyConfig(layers=1, tied=True))
    result = run(program, FoldNorms())
    reason = "the gain stays: linear_7 reads the norm and is no plain linear"
    (miss,) = result.near_misses
    assert (miss.what, miss.node, miss.reason) == ("norm", "rms_norm_default_2", reason)
    assert ", line " in miss.source
    assert result.changed == 2
    assert "model.norm.weight" in pick(program, "rms_norm_default_2")
    site = program.sites.residual
    assert site is not None
    assert site.refused == {"residual": reason, "scaling": reason}


def test_a_norm_inside_attention_keeps_its_gain() -> None:
    """QK-norm: no linear reads it. The residual stream does not mind, and nothing is missed."""
    program = with_sites(ToyConfig(layers=1, qk_norm=True))
    result = run(program, FoldNorms())
    assert result.changed == 3
    assert result.near_misses == ()
    assert "q_norm.weight" in pick(program, "rms_norm_default_1")
    site = program.sites.residual
    assert site is not None
    assert site.refused == {}


def test_twice() -> None:
    assert_settled(with_sites(ONE, FoldNorms()), FoldNorms())
