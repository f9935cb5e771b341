"""insert_residual (T_r): one rotation of the stream, in every writer and every reader."""

from __future__ import annotations

from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.insert_transforms import InsertResidual
from fptq_compiler.passes.untie_weights import UntieWeights
from fptq_compiler.transforms import Rotation, Side
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

READY = (UntieWeights(), FoldNorms())
PATH = "model.layers.0"

BEFORE = """
embedding = embedding(%model.embed_tokens.weight, input_ids)
linear_6 = linear(mul_5, %model.layers.0.mlp.down_proj.weight)
edges_gain_rms_norm_default_2_linear_7 = \
[edges.gain_rms_norm_default_2.linear_7](%lm_head.weight)
linear_7 = linear(rms_norm_default_2, edges_gain_rms_norm_default_2_linear_7)
"""

AFTER = """
edges_residual_0 = [edges.residual.0](%model.embed_tokens.weight)
embedding = embedding(edges_residual_0, input_ids)
edges_residual_2 = [edges.residual.2](%model.layers.0.mlp.down_proj.weight)
linear_6 = linear(mul_5, edges_residual_2)
edges_gain_rms_norm_default_2_linear_7 = \
[edges.gain_rms_norm_default_2.linear_7](%lm_head.weight)
edges_residual_8 = [edges.residual.8](edges_gain_rms_norm_default_2_linear_7)
linear_7 = linear(rms_norm_default_2, edges_residual_8)
"""


def test_text() -> None:
    program = with_sites(ONE, *READY)
    gain = "edges_gain_rms_norm_default_2_linear_7"
    assert pick(program, "embedding", "linear_6", gain, "linear_7") == BEFORE
    assert run(program, InsertResidual(1)).changed == 9
    assert (
        pick(
            program,
            "edges_residual_0",
            "embedding",
            "edges_residual_2",
            "linear_6",
            gain,
            "edges_residual_8",
            "linear_7",
        )
        == AFTER
    )


def test_ports() -> None:
    """The table and the writers see T on their outputs, the readers undo it; biases turn too."""
    program = with_sites(ToyConfig(layers=1, output_bias=True), *READY, InsertResidual(1))
    edges = program.module.get_submodule("edges.residual")
    ports = [e.port for e in edges.children()]  # type: ignore[union-attr]
    assert [(p.parameter, p.side) for p in ports] == [
        ("model.embed_tokens.weight", Side.TABLE),
        (f"{PATH}.self_attn.o_proj.weight", Side.OUT),
        (f"{PATH}.self_attn.o_proj.bias", Side.OUT),
        (f"{PATH}.mlp.down_proj.weight", Side.OUT),
        (f"{PATH}.self_attn.q_proj.weight", Side.IN),
        (f"{PATH}.self_attn.k_proj.weight", Side.IN),
        (f"{PATH}.self_attn.v_proj.weight", Side.IN),
        (f"{PATH}.mlp.gate_proj.weight", Side.IN),
        (f"{PATH}.mlp.up_proj.weight", Side.IN),
        ("lm_head.weight", Side.IN),
    ]
    assert not any(p.inverse_transpose for p in ports)


def test_numbers() -> None:
    for config in (ONE, ToyConfig(layers=1, output_bias=True)):
        assert change(with_sites(config, *READY), InsertResidual(1)) < EXACT


def test_the_seed_gives_the_map() -> None:
    one, same, other = (
        with_sites(ONE, *READY, InsertResidual(s)).maps["residual"] for s in (1, 1, 2)
    )
    assert isinstance(one, Rotation)
    assert one.matrix().equal(same.matrix())
    assert not one.matrix().equal(other.matrix())


def test_near_miss() -> None:
    """A tied head keeps the last gain, so nothing may turn the stream: it says so, and stops."""
    program = with_sites(ToyConfig(layers=1, tied=True), FoldNorms())
    program.facts.add("untied")
    assert run(program, InsertResidual(1)).changed == 0
    assert program.maps == {}
    site = program.sites.residual
    assert site is not None
    assert site.refused["residual"] == (
        "the gain stays: linear_7 reads the norm and is no plain linear"
    )


def test_twice() -> None:
    assert_settled(with_sites(ONE, *READY, InsertResidual(1)), InsertResidual(1))
