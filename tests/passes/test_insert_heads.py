"""insert_heads (QuaRot): a Hadamard across heads in front of o_proj, its inverse in the weight."""

from __future__ import annotations

from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.passes.insert_heads import InsertHeads
from fptq_compiler.passes.insert_transforms import InsertValue
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

NAME = "heads_model_layers_0_self_attn"

BEFORE = """
flatten = flatten.using_ints(transpose_3, 2)
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
"""

AFTER = """
online_heads_model_layers_0_self_attn = [online.heads_model_layers_0_self_attn](flatten)
edges_heads_model_layers_0_self_attn_0 = [edges.heads_model_layers_0_self_attn.0]\
(%model.layers.0.self_attn.o_proj.weight)
linear_3 = linear(online_heads_model_layers_0_self_attn, edges_heads_model_layers_0_self_attn_0)
"""

FROZEN = """
mix = mix(flatten, None, %online.hadamard_4, 8)
linear_3 = linear(mix, %model.layers.0.self_attn.o_proj.weight)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, "flatten", "linear_3") == BEFORE
    assert run(program, InsertHeads()).changed == 1
    assert pick(program, f"online_{NAME}", f"edges_{NAME}_0", "linear_3") == AFTER


def test_heads_alone_are_multiplied_at_run_time() -> None:
    program = with_sites(ONE, InsertHeads(), FoldTransforms())
    assert change(program, FreezeOnline()) < EXACT  # entries of a half are exact in float32
    assert pick(program, "mix", "linear_3") == FROZEN


def test_numbers() -> None:
    """Three heads have no Hadamard of their order, and mix all the same; one is behind T_v."""
    for config in (ONE, ToyConfig(layers=1, heads=3, kv_heads=3, output_bias=True)):
        assert change(with_sites(config), InsertHeads()) < EXACT
        assert change(with_sites(config, InsertValue(1, "hadamard")), InsertHeads()) < EXACT


def test_near_miss() -> None:
    program = with_sites(ToyConfig(layers=1, heads=1, kv_heads=1))
    assert run(program, InsertHeads()).changed == 0
    assert program.maps == {}
    (site,) = program.sites.attention
    assert site.refused["heads"] == "it has one head, and none to mix it with"
    (miss,) = (m for m in program.near_misses if m.what == "heads")
    assert 'toys.py", line' in miss.source


def test_twice() -> None:
    assert_settled(with_sites(ONE, InsertHeads()), InsertHeads())
