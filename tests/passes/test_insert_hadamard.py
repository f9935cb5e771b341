"""insert_hadamard (T_d): a Hadamard in front of down at run time, its transpose in the weight."""

from __future__ import annotations

from dataclasses import replace

from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.insert_transforms import InsertHadamard
from tests.passes.steps import EXACT, ONE, assert_settled, change, edited, pick, run, with_sites
from tests.toys import Toy, ToyConfig

BEFORE = """
linear_6 = linear(mul_5, %model.layers.0.mlp.down_proj.weight)
"""

AFTER = """
online_hadamard_model_layers_0_mlp = [online.hadamard_model_layers_0_mlp](mul_5)
edges_hadamard_model_layers_0_mlp_0 = [edges.hadamard_model_layers_0_mlp.0]\
(%model.layers.0.mlp.down_proj.weight)
linear_6 = linear(online_hadamard_model_layers_0_mlp, edges_hadamard_model_layers_0_mlp_0)
"""

FOLDED = """
online_hadamard_model_layers_0_mlp = [online.hadamard_model_layers_0_mlp](mul_5)
linear_6 = linear(online_hadamard_model_layers_0_mlp, %model.layers.0.mlp.down_proj.weight)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, "linear_6") == BEFORE
    assert run(program, InsertHadamard()).changed == 1
    online, edge = "online_hadamard_model_layers_0_mlp", "edges_hadamard_model_layers_0_mlp_0"
    assert pick(program, online, edge, "linear_6") == AFTER
    run(program, FoldTransforms())
    assert pick(program, online, "linear_6") == FOLDED


def test_numbers() -> None:
    """40 is 2 x 20; 36 has a Hadamard of its own; 21 has none but the identity."""
    for width in (40, 36, 21):
        assert change(with_sites(ToyConfig(layers=1, mlp=width)), InsertHadamard()) < EXACT


def test_blocks_where_they_divide_the_width() -> None:
    expected = {128: "block diagonal, 2 blocks of 64 Hadamard", 40: "20 x 2 Hadamard"}
    for width, words in expected.items():
        program = with_sites(ToyConfig(layers=1, mlp=width))
        assert change(program, InsertHadamard(64)) < EXACT
        assert [m.describe() for m in program.maps.values()] == [words]


def _share(toy: Toy) -> None:
    toy.model.layers[1].mlp = toy.model.layers[0].mlp


def test_layers_that_share_their_weights_share_the_map() -> None:
    program = edited(ToyConfig(), _share, *FIND_SITES)
    assert change(program, InsertHadamard()) < EXACT
    assert list(program.maps) == ["hadamard.model.layers.1.mlp"]
    assert_settled(program, InsertHadamard())


def test_near_miss() -> None:
    """A site that refuses stays, and the one beside it does not."""
    program = with_sites(ToyConfig())
    first, second = program.sites.mlp
    first = replace(first, refused={"hadamard": "not wanted here"})
    program.sites = replace(program.sites, mlp=(first, second))
    assert run(program, InsertHadamard()).changed == 1
    assert list(program.maps) == ["hadamard.model.layers.1.mlp"]
    assert pick(program, "linear_6") == BEFORE


def test_twice() -> None:
    assert_settled(with_sites(ONE, InsertHadamard()), InsertHadamard())
