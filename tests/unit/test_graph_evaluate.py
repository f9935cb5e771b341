"""Evaluation: a run as written, a run in float64, and regions on chosen values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.fx import Node

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from tests.toys import ToyConfig, export_toy, make_tokens, make_toy

CONFIG = ToyConfig(layers=1, norm="spelled")


@pytest.fixture(scope="module")
def program() -> Program:
    return unlift(export_toy(CONFIG))


def test_a_run_equals_the_model(program: Program) -> None:
    ids = make_tokens(CONFIG, 3, 9)
    # No tolerance: the same kernels on the same values.
    assert program.run(ids).equal(make_toy(CONFIG)(ids))


def test_float64_throughout(program: Program) -> None:
    """Also where the model casts its norms to float32, and its parameters stay float32."""
    ids = make_tokens(CONFIG, 2, 9)
    dtypes: set[torch.dtype] = set()

    def watch(node: Node, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            dtypes.add(value.dtype)

    arguments = program.arguments(ids)
    (logits,) = evaluate.run(program.module, arguments, dtype=torch.float64, watch=watch)
    assert dtypes == {torch.float64}
    assert {p.dtype for p in program.module.parameters()} == {torch.float32}
    # Float32 rounds to 6e-8 an operation, of which about a hundred follow each other.
    torch.testing.assert_close(logits.float(), program.run(ids), rtol=0, atol=1e-5)


def test_values_die_after_their_last_reader() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.add, (a, x))
    output = graph.output((b,))
    assert evaluate.last_uses([a, b, output]) == {b: [a, x], output: [b]}


def test_a_wrong_number_of_inputs(program: Program) -> None:
    with pytest.raises(ValueError, match="shorter"):
        evaluate.run(program.module, [])


def test_ancestors_stop_where_told() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.abs, (a,))
    c = graph.call_function(torch.add, (b, a))
    assert evaluate.ancestors(c) == [x, a, b, c]
    assert evaluate.ancestors(c, (a,)) == [b, c]


def test_attribute_follows_dots(program: Program) -> None:
    found = evaluate.attribute(program.module, "model.norm.weight")
    assert found is program.parameter("model.norm.weight")


def test_default_inputs_hide_nothing() -> None:
    graph = fx.Graph()
    fakes = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "position_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.zeros(2, 5, dtype=torch.long),
        "scale": torch.zeros(5),
    }
    for name, value in fakes.items():
        graph.placeholder(name).meta["val"] = value
    graph.output(())
    module = fx.GraphModule(torch.nn.Module(), graph)
    found = {n.name: v for n, v in evaluate.default_inputs(module, 2, 5).items()}
    assert found["input_ids"].tolist() == [[0] * 5] * 2
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert found["attention_mask"].tolist() == [[1] * 5] * 2
    assert found["scale"].tolist() == [0.0] * 5


# Regions


def test_a_region_knows_its_shapes(program: Program) -> None:
    region = evaluate.Region(program.module, 3, 11)
    assert region.shape(program.node("input_ids")) == (3, 11)
    assert region.shape(program.node("transpose")) == (3, 4, 11, 8)


def test_a_region_on_chosen_values(program: Program) -> None:
    region = evaluate.Region(program.module, 2, 5)
    linear = program.node("linear")
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    source = linear.args[0]
    assert isinstance(source, Node)
    weight = program.parameter("model.layers.0.self_attn.q_proj.weight").double()
    # No tolerance: the same kernel in float64.
    assert region.value(linear, {source: x}).equal(torch.nn.functional.linear(x, weight))


def test_a_region_computes_tables_once(program: Program) -> None:
    """What hangs on sizes alone is kept; what hangs on a chosen value is not."""
    region = evaluate.Region(program.module, 2, 5)
    view, target = program.node("view"), program.node("add_1")
    cosine = program.node("cos")
    one = torch.ones(2, 5, 4, 8, dtype=torch.float64)
    first = region.value(target, {view: one})
    assert cosine in region._cache
    assert target not in region._cache
    # No tolerance: doubling is exact in binary arithmetic.
    assert region.value(target, {view: 2 * one}).equal(2 * first)


def test_a_parameter_is_its_own_value(program: Program) -> None:
    region = evaluate.Region(program.module, 2, 5)
    weight = program.node("linear").args[1]
    assert isinstance(weight, Node)
    assert region.value(weight, {}).dtype == torch.float64
