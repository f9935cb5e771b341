"""fold_transforms: every weight edge is evaluated in float64, and its parameter replaced."""

from __future__ import annotations

import torch

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.insert_transforms import (
    InsertHadamard,
    InsertPrerope,
    InsertResidual,
    InsertUpdown,
    InsertValue,
)
from tests.passes.steps import ONE, SEED, assert_settled, pick, run, with_sites
from tests.toys import ToyConfig, make_tokens

BEFORE = """
edges_updown_model_layers_0_mlp_1 = [edges.updown_model_layers_0_mlp.1]\
(%model.layers.0.mlp.down_proj.weight)
edges_hadamard_model_layers_0_mlp_0 = \
[edges.hadamard_model_layers_0_mlp.0](edges_updown_model_layers_0_mlp_1)
edges_residual_2 = [edges.residual.2](edges_hadamard_model_layers_0_mlp_0)
online_hadamard_model_layers_0_mlp = [online.hadamard_model_layers_0_mlp](mul_5)
linear_6 = linear(online_hadamard_model_layers_0_mlp, edges_residual_2)
"""

AFTER = """
online_hadamard_model_layers_0_mlp = [online.hadamard_model_layers_0_mlp](mul_5)
linear_6 = linear(online_hadamard_model_layers_0_mlp, %model.layers.0.mlp.down_proj.weight)
"""


def _inserted(config: ToyConfig) -> Program:
    """Every map, with parameters as far from the identity as training takes them."""
    program = with_sites(
        config, FoldNorms(), InsertValue(1), InsertPrerope(), InsertUpdown(), InsertHadamard()
    )
    program.facts.add("untied")  # an untied model needs no pass for it
    run(program, InsertResidual(1))
    generator = torch.Generator().manual_seed(SEED)
    for transform in program.maps.values():
        transform.randomize_(generator, 0.3)
    return program


def test_text() -> None:
    program = _inserted(ONE)
    chain = (
        "edges_updown_model_layers_0_mlp_1",
        "edges_hadamard_model_layers_0_mlp_0",
        "edges_residual_2",
    )
    reader = ("online_hadamard_model_layers_0_mlp", "linear_6")
    assert pick(program, *chain, *reader) == BEFORE
    # The embedding, the head, and the seven linears of the block.
    assert run(program, FoldTransforms()).changed == 9
    assert pick(program, *reader) == AFTER
    assert not hasattr(program.module, "edges")


@torch.no_grad()
def _fold_error(config: ToyConfig) -> float:
    program = _inserted(config)
    ids = make_tokens(config, 2, 11)
    before = evaluate.logits(program.module, program.arguments(ids), torch.float64)
    run(program, FoldTransforms())
    after = evaluate.logits(program.module, program.arguments(ids), torch.float64)
    return relative_error(after, before)


def test_numbers() -> None:
    # Nine weights are rounded to float32 once, 6e-8 each.
    assert _fold_error(ONE) < 1e-6
    # In a float64 model nothing is rounded: the edges and the fold are one arithmetic.
    assert _fold_error(ToyConfig(layers=1, dtype=torch.float64)) < 1e-13


def test_near_miss() -> None:
    """Nothing to fold: the parameters are the same objects."""
    program = with_sites(ONE)
    before = dict(program.module.named_parameters())
    assert run(program, FoldTransforms()).changed == 0
    after = dict(program.module.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_twice() -> None:
    program = _inserted(ONE)
    run(program, FoldTransforms())
    assert_settled(program, FoldTransforms())
