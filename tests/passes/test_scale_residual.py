"""scale_residual (S_n): the stream is carried normalised, every branch scaled by the same factor.

r_n = 1 / sqrt(mean(Z̃_n²) + ε S_{n-1}²)     S_n = S_{n-1} r_n     Ẑ_n = r_n Z̃_n
Z̃_{n+1} = Ẑ_n + S_n F_n(Ẑ_n)
"""

from __future__ import annotations

import pytest
import torch

from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.scale_residual import ScaleResidual
from fptq_compiler.passes.untie_weights import UntieWeights
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, span, with_sites
from tests.toys import ToyConfig

READY = (UntieWeights(), FoldNorms())

BEFORE = """
rms_norm_default = fptq.rms_norm(embedding, None, 1e-05)
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
add_2 = add(embedding, linear_3)
rms_norm_default_1 = fptq.rms_norm(add_2, None, 1e-05)
"""

FIRST_NORM = """
sum_of_squares_default = fptq.sum_of_squares(embedding)
add_tensor = add(sum_of_squares_default, 0.00024000000000000003)
reciprocal_default = reciprocal(add_tensor)
mul_tensor = mul(reciprocal_default, 24.0)
sqrt_default = sqrt(mul_tensor)
mul_tensor_1 = mul(mul_tensor, 0.00024000000000000003)
mul_tensor_2 = mul(embedding, sqrt_default)
"""

BRANCH_AND_SECOND_NORM = """
mul_tensor_3 = mul(flatten, sqrt_default)
linear_3 = linear(mul_tensor_3, %model.layers.0.self_attn.o_proj.weight)
add_2 = add(mul_tensor_2, linear_3)
sum_of_squares_default_1 = fptq.sum_of_squares(add_2)
add_tensor_1 = add(sum_of_squares_default_1, mul_tensor_1)
reciprocal_default_1 = reciprocal(add_tensor_1)
mul_tensor_4 = mul(reciprocal_default_1, 24.0)
sqrt_default_1 = sqrt(mul_tensor_4)
mul_tensor_5 = mul(sqrt_default, sqrt_default_1)
mul_tensor_6 = mul(mul_tensor_4, mul_tensor_1)
mul_tensor_7 = mul(add_2, sqrt_default_1)
"""


def test_text() -> None:
    program = with_sites(ONE, *READY)
    before = pick(program, "rms_norm_default", "linear_3", "add_2", "rms_norm_default_1")
    assert before == BEFORE
    assert run(program, ScaleResidual()).changed == 3
    assert span(program, "sum_of_squares_default", "mul_tensor_2") == FIRST_NORM
    assert span(program, "mul_tensor_3", "mul_tensor_7") == BRANCH_AND_SECOND_NORM
    assert program.scaled


BIASED = """
linear_3 = linear(mul_tensor_3, %model.layers.0.self_attn.o_proj.weight)
mul_tensor_4 = mul(sqrt_default, %model.layers.0.self_attn.o_proj.bias)
add_tensor_1 = add(linear_3, mul_tensor_4)
add_2 = add(mul_tensor_2, add_tensor_1)
"""


def test_a_bias_is_scaled_too() -> None:
    program = with_sites(ToyConfig(layers=1, output_bias=True), *READY, ScaleResidual())
    assert span(program, "linear_3", "add_2") == BIASED


AT_THE_OUTPUT = """
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
mul_tensor_3 = mul(linear_3, sqrt_default)
add_2 = add(mul_tensor_2, mul_tensor_3)
"""


def test_a_place_that_is_left_out_is_scaled_behind_its_linear() -> None:
    program = with_sites(ONE, *READY, ScaleResidual(("down_proj",)))
    assert span(program, "linear_3", "add_2") == AT_THE_OUTPUT


@pytest.mark.parametrize("places", [("down_proj", "o_proj"), ("down_proj",), ("o_proj",), ()])
def test_numbers(places: tuple[str, ...]) -> None:
    config = ToyConfig(output_bias=True, mlp_bias=True)
    assert change(with_sites(config, *READY), ScaleResidual(places)) < EXACT


def test_numbers_where_the_embedding_is_small() -> None:
    """There epsilon is most of the first norm: only ε S² keeps the second one right."""
    program = with_sites(ONE, *READY)
    table = program.parameter("model.embed_tokens.weight")
    with torch.no_grad():
        program.module.get_submodule("model.embed_tokens").weight = torch.nn.Parameter(
            table * 1e-3, requires_grad=False
        )
    assert change(program, ScaleResidual()) < EXACT


def test_near_miss() -> None:
    """A tied head keeps the last gain: the stream stays as it is, and the site says why."""
    program = with_sites(ToyConfig(layers=1, tied=True), FoldNorms())
    assert run(program, ScaleResidual()).changed == 0
    assert not program.scaled
    site = program.sites.residual
    assert site is not None
    assert site.refused["scaling"] == (
        "the gain stays: linear_7 reads the norm and is no plain linear"
    )
    assert any(", line " in m.source for m in program.near_misses if m.what == "norm")


def test_twice() -> None:
    assert_settled(with_sites(ONE, *READY, ScaleResidual()), ScaleResidual())
