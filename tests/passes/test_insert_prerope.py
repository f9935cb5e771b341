"""insert_prerope (T_k): a turn and a scale of RoPE's pairs, T on keys, T⁻ᵀ on queries."""

from __future__ import annotations

from fptq_compiler.passes.insert_transforms import InsertPrerope
from fptq_compiler.transforms import RopePairs
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

NAME = "prerope.model.layers.0.self_attn"

BEFORE = """
linear = linear(rms_norm_default, %model.layers.0.self_attn.q_proj.weight)
linear_1 = linear(rms_norm_default, %model.layers.0.self_attn.k_proj.weight)
"""

AFTER = """
edges_prerope_model_layers_0_self_attn_1 = [edges.prerope_model_layers_0_self_attn.1]\
(%model.layers.0.self_attn.q_proj.weight)
linear = linear(rms_norm_default, edges_prerope_model_layers_0_self_attn_1)
edges_prerope_model_layers_0_self_attn_0 = [edges.prerope_model_layers_0_self_attn.0]\
(%model.layers.0.self_attn.k_proj.weight)
linear_1 = linear(rms_norm_default, edges_prerope_model_layers_0_self_attn_0)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, "linear", "linear_1") == BEFORE
    assert run(program, InsertPrerope()).changed == 1
    edge = "edges_prerope_model_layers_0_self_attn"
    assert pick(program, f"{edge}_1", "linear", f"{edge}_0", "linear_1") == AFTER
    transform = program.maps[NAME]
    assert isinstance(transform, RopePairs)
    assert transform.pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_queries_share_their_group_s_map() -> None:
    program = with_sites(ONE, InsertPrerope())
    edges = program.module.get_submodule("edges.prerope_model_layers_0_self_attn")
    keys, queries = (e.port for e in edges.children())  # type: ignore[union-attr]
    assert (keys.inverse_transpose, keys.repeat) == (False, 1)
    assert (queries.inverse_transpose, queries.repeat) == (True, 2)


def test_numbers() -> None:
    """Also where some channels pass RoPE by, and where the keys have a bias."""
    configs = (ONE, ToyConfig(layers=1, rope="partial"), ToyConfig(layers=1, attention_bias=True))
    for config in configs:
        assert change(with_sites(config), InsertPrerope()) < EXACT


def test_near_miss() -> None:
    program = with_sites(ToyConfig(layers=1, qk_norm=True))
    assert run(program, InsertPrerope()).changed == 0
    assert program.maps == {}
    (site,) = program.sites.attention
    assert site.refused["prerope"] == (
        "query: a norm stands between the projection and attention (QK-norm)"
    )
    (miss,) = (m for m in program.near_misses if m.what == "prerope")
    assert 'toys.py", line' in miss.source


def test_twice() -> None:
    assert_settled(with_sites(ONE, InsertPrerope()), InsertPrerope())
