"""carry_epsilon: ε d S² stands in one more channel of the stream, and a norm is one operator."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from fptq_compiler.graph.surgery import call
from fptq_compiler.passes.carry_epsilon import CarryEpsilon
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.insert_transforms import InsertResidual
from fptq_compiler.passes.scale_residual import ScaleResidual
from fptq_compiler.passes.untie_weights import UntieWeights
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, span, with_sites
from tests.toys import ToyConfig

WIDE = torch.float64  # the readers' constant is rounded to the weights' own type
SCALED = (UntieWeights(), FoldNorms(), ScaleResidual(("down_proj",)), FoldTransforms())

FIRST = """
constant_pad_nd_default = constant_pad_nd(embedding, [0, 1], 0.01549193338482967)
unit_rms_default = fptq.unit_rms(constant_pad_nd_default)
getitem = getitem(unit_rms_default, 0)
getitem_1 = getitem(unit_rms_default, 1)
"""

BRANCHES = """
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
mul_tensor_3 = mul(linear_3, getitem_1)
add_2 = add(getitem, mul_tensor_3)
unit_rms_default_1 = fptq.unit_rms(add_2)
getitem_2 = getitem(unit_rms_default_1, 0)
getitem_3 = getitem(unit_rms_default_1, 1)
mul_tensor_5 = mul(getitem_1, getitem_3)
"""


def test_text() -> None:
    program = with_sites(ONE, *SCALED)
    assert run(program, CarryEpsilon()).changed == 3
    assert span(program, "constant_pad_nd_default", "getitem_1") == FIRST
    assert span(program, "linear_3", "mul_tensor_5") == BRANCHES
    weights = {
        name: tuple(program.parameter(f"model.layers.0.{name}.weight").shape)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert weights == {
        "self_attn.q_proj": (32, 25), "self_attn.o_proj": (25, 32),
        "mlp.up_proj": (40, 25), "mlp.down_proj": (25, 40),
    }
    assert not bool(program.parameter("model.layers.0.mlp.down_proj.weight")[-1].any())
    assert not bool(program.parameter("model.layers.0.mlp.up_proj.weight")[:, -1].any())


@pytest.mark.parametrize("places", [("down_proj", "o_proj"), ("down_proj",), ()])
def test_numbers(places: tuple[str, ...]) -> None:
    config = ToyConfig(output_bias=True, mlp_bias=True, dtype=WIDE)
    steps = (UntieWeights(), FoldNorms(), ScaleResidual(places), FoldTransforms())
    assert change(with_sites(config, *steps), CarryEpsilon()) < EXACT


def test_numbers_behind_a_rotation() -> None:
    steps = (*SCALED[:3], InsertResidual(0), FoldTransforms())
    assert change(with_sites(ToyConfig(dtype=WIDE), *steps), CarryEpsilon()) < EXACT


def test_numbers_where_the_embedding_is_small() -> None:
    """There the new channel is most of the first norm."""
    program = with_sites(ToyConfig(layers=1, dtype=WIDE), *SCALED)
    table = program.parameter("model.embed_tokens.weight")
    program.module.get_submodule("model.embed_tokens").weight = torch.nn.Parameter(
        table * 1e-3, requires_grad=False
    )
    assert change(program, CarryEpsilon()) < EXACT


def test_widths_are_recorded() -> None:
    """What later passes read of a value's shape is what it has."""
    program = with_sites(ToyConfig(output_bias=True), *SCALED, CarryEpsilon())
    site = program.sites.residual
    assert site is not None
    streams = [program.node(name) for name in site.stream[1:]]
    assert len(streams) == 4
    for node in streams:
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        assert {v.shape[-1] for v in values if v is not None} == {25}


def test_near_miss() -> None:
    """A stream that is not scaled keeps its norms."""
    program = with_sites(ONE, UntieWeights(), FoldNorms(), FoldTransforms())
    before = pick(program, "rms_norm_default", "rms_norm_default_1")
    assert run(program, CarryEpsilon()).changed == 0
    assert pick(program, "rms_norm_default", "rms_norm_default_1") == before


def test_near_miss_a_product_of_channels_behind_a_norm() -> None:
    """What reads a norm and is no linear would see the new channel."""
    program = with_sites(ONE, *SCALED)
    reader = program.node("linear_4")
    source = reader.args[0]
    assert isinstance(source, Node)
    halves = call(program.graph, reader, torch.ops.aten.view.default, (source, [-1, 2, 12]),
                  like=source)
    call(program.graph, reader, torch.ops.aten.add.Tensor, (halves, halves), like=source)
    assert run(program, CarryEpsilon()).changed == 0


def test_twice() -> None:
    assert_settled(with_sites(ONE, *SCALED, CarryEpsilon()), CarryEpsilon())
