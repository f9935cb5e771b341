"""freeze_online: a Hadamard at run time becomes small matmuls on factors that all layers share."""

from __future__ import annotations

from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.passes.insert_transforms import InsertHadamard, InsertUpdown
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

READY = (InsertHadamard(), FoldTransforms())

BEFORE = """
online_hadamard_model_layers_0_mlp = [online.hadamard_model_layers_0_mlp](mul_5)
linear_6 = linear(online_hadamard_model_layers_0_mlp, %model.layers.0.mlp.down_proj.weight)
"""

AFTER = """
mix = mix(mul_5, None, %online.hadamard_20, %online.hadamard_2)
linear_6 = linear(mix, %model.layers.0.mlp.down_proj.weight)
"""


def test_text() -> None:
    program = with_sites(ONE, *READY)
    assert pick(program, "online_hadamard_model_layers_0_mlp", "linear_6") == BEFORE
    assert run(program, FreezeOnline()).changed == 1
    assert pick(program, "mix", "linear_6") == AFTER


def test_numbers() -> None:
    # The factors are stored in float32, rounded to 6e-8; powers of two would be exact.
    assert change(with_sites(ONE, *READY), FreezeOnline()) < 1e-6
    assert change(with_sites(ToyConfig(layers=1, mlp=64), *READY), FreezeOnline()) < EXACT


def test_a_block_is_one_matmul() -> None:
    steps = (InsertHadamard(16), FoldTransforms())
    program = with_sites(ToyConfig(layers=1, mlp=64), *steps)
    assert change(program, FreezeOnline()) < EXACT
    assert pick(program, "mix") == "\nmix = mix(mul_5, None, %online.hadamard_16)\n"


def test_all_layers_share_the_factors() -> None:
    program = with_sites(ToyConfig(), *READY)
    assert run(program, FreezeOnline()).changed == 2
    stored = {n for n, _ in program.module.named_parameters() if n.startswith("online.")}
    assert stored == {"online.hadamard_20", "online.hadamard_2"}


def test_near_miss() -> None:
    """Nothing is computed at run time: T_u went into the weights."""
    program = with_sites(ONE, InsertUpdown(), FoldTransforms())
    assert run(program, FreezeOnline()).changed == 0


def test_twice() -> None:
    assert_settled(with_sites(ONE, *READY, FreezeOnline()), FreezeOnline())
