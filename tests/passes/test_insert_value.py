"""insert_value (T_v): a map of each KV head's values, undone in the output projection."""

from __future__ import annotations

import pytest

from fptq_compiler.passes.insert_transforms import InsertValue
from fptq_compiler.transforms import Affine
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

NAME = "value.model.layers.0.self_attn"

BEFORE = """
linear_2 = linear(rms_norm_default, %model.layers.0.self_attn.v_proj.weight)
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
"""

AFTER = """
edges_value_model_layers_0_self_attn_0 = [edges.value_model_layers_0_self_attn.0]\
(%model.layers.0.self_attn.v_proj.weight)
linear_2 = linear(rms_norm_default, edges_value_model_layers_0_self_attn_0)
edges_value_model_layers_0_self_attn_1 = [edges.value_model_layers_0_self_attn.1]\
(%model.layers.0.self_attn.o_proj.weight)
linear_3 = linear(flatten, edges_value_model_layers_0_self_attn_1)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, "linear_2", "linear_3") == BEFORE
    assert run(program, InsertValue(1)).changed == 1
    edge = "edges_value_model_layers_0_self_attn"
    assert pick(program, f"{edge}_0", "linear_2", f"{edge}_1", "linear_3") == AFTER
    transform = program.maps[NAME]
    assert isinstance(transform, Affine)
    assert (transform.blocks, transform.block) == (2, 8)  # one a KV head


def test_numbers() -> None:
    packed = ToyConfig(layers=1, packed_qkv="slice", attention_bias=True)
    for config in (ONE, packed, ToyConfig(layers=1, kv_heads=4)):
        assert change(with_sites(config), InsertValue(1)) < EXACT


@pytest.mark.parametrize(
    ("kind", "words"),
    [("affine", "Affine 2 x 8"), ("rotation", "Rotation 2 x 8"),
     ("hadamard", "block diagonal, 2 blocks of 8 Hadamard")],
)
def test_what_the_map_may_become(kind: str, words: str) -> None:
    program = with_sites(ONE)
    assert change(program, InsertValue(1, kind)) < EXACT
    transform = program.maps[NAME]
    assert transform.describe() == words
    start = transform.matrix()[:8, :8]
    assert (start.abs() - 8**-0.5).abs().max() < 1e-12  # float64: a Hadamard of every head


def test_near_miss() -> None:
    program = with_sites(ToyConfig(layers=1, value_readers=2))
    assert run(program, InsertValue(1)).changed == 0
    assert program.maps == {}
    (site,) = program.sites.attention
    assert site.refused["value"] == "v has a second reader, mean"
    (miss,) = (m for m in program.near_misses if m.what == "value")
    assert 'toys.py", line' in miss.source


def test_twice() -> None:
    assert_settled(with_sites(ONE, InsertValue(1)), InsertValue(1))
