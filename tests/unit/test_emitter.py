"""The emitter of ONNX nodes, and the expansion of carried operators with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.expand import expand
from fptq_compiler.lower.targets.carried import DOMAIN

FLOAT = ir.TensorType(ir.DataType.FLOAT)
INT64 = ir.TensorType(ir.DataType.INT64)


def names(nodes: list[ir.Node]) -> list[str]:
    return [str(v.name) for node in nodes for v in node.outputs]


def test_formulas_become_nodes_in_order() -> None:
    op = Emitter("layer_0")
    x = ir.Value(name="x")
    found = op.Add(x, op.Mul(x, op.float(2.0)))
    assert [n.op_type for n in op.nodes] == ["Constant", "Mul", "Add"]
    assert names(op.nodes) == ["layer_0_0", "layer_0_1", "layer_0_2"]
    assert op.nodes[2].inputs == (x, op.nodes[1].outputs[0])
    assert op.nodes[2].outputs[0] is found
    assert {n.domain for n in op.nodes} == {""}


def test_constants() -> None:
    op = Emitter("c")
    for value in (op.ints(3, -1), op.int(7), op.float(0.5)):
        assert isinstance(value, ir.Value)
    found = [(a.name, a.value) for n in op.nodes for a in n.attributes.values()]
    assert found == [("value_ints", (3, -1)), ("value_int", 7), ("value_float", 0.5)]


def test_several_outputs_attributes_and_a_domain() -> None:
    op = Emitter("s")
    x = ir.Value(name="x")
    first, second = op.make("Halve", x, None, domain="com.example", outputs=2, axis=1)
    (node,) = op.nodes
    assert node.outputs == (first, second)
    assert (node.domain, node.attributes["axis"].value, node.inputs) == (
        "com.example", 1, (x, None)
    )
    assert names(op.nodes) == ["s_0", "s_1"]


def test_private_names_are_no_operators() -> None:
    with pytest.raises(AttributeError, match="_Add"):
        _ = Emitter("p")._Add


def test_once_is_shared_across_emitters_and_branches() -> None:
    shared = Emitter("shared")
    first, second = Emitter("a", shared), Emitter("b", shared)
    calls: list[Emitter] = []

    def make(home: Emitter) -> Any:
        calls.append(home)
        return home.float(1.0)

    inside: list[Any] = []

    def body(inner: Emitter) -> list[Any]:
        inside.append(inner.once("one", make))
        return [inner.Identity(inside[0])]

    graph = first.branch("then", body)
    values = [first.once("one", make), second.once("one", make), *inside]
    assert calls == [shared]
    assert all(v is values[0] for v in values)
    assert names(shared.nodes) == ["shared_0"]
    assert [n.op_type for n in graph] == ["Identity"]  # not in the branch that asked first
    other = second.once("two", make)
    assert other is not values[0]
    assert len(calls) == 2


def test_without_a_home_once_is_the_emitter_s_own() -> None:
    op = Emitter("alone")
    assert op.once("k", lambda home: home.int(1)) is op.once("k", lambda home: home.int(2))
    assert len(op.nodes) == 1


def test_names_are_unique_in_branches_of_branches() -> None:
    op = Emitter("x")
    inner_names: list[str] = []

    def inner(emitter: Emitter) -> list[Any]:
        value = emitter.float(1.0)
        inner_names.append(value.name)
        return [value]

    def outer(emitter: Emitter) -> list[Any]:
        flag = emitter.Cast(emitter.int(1), to=9)
        found = emitter.make(
            "If", flag, then_branch=emitter.branch("yes", inner),
            else_branch=emitter.branch("no", inner),
        )
        inner_names.extend(names(emitter.nodes))
        return [found]

    op.branch("then", outer)
    op.branch("else", outer)
    inner_names += names([op.float(0.0).producer()])
    assert len(inner_names) == len(set(inner_names)) == 11


# Expansion: a graph with two carried nodes, one of which is in the output's way.


def carried_model() -> ir.Model:
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(["N"]))
    first = ir.node("Twice", [x], domain=DOMAIN)
    first.outputs[0].name = "first"
    plain = ir.node("Neg", [first.outputs[0]])
    plain.outputs[0].name = "plain"
    second = ir.node("Twice", [plain.outputs[0]], domain=DOMAIN)
    last = second.outputs[0]
    last.name = "last"
    for value in (first.outputs[0], plain.outputs[0], last):
        value.type, value.shape = FLOAT, ir.Shape(["N"])
    graph = ir.Graph(
        [x], [last], nodes=[first, plain, second], name="main", opset_imports={"": 21, DOMAIN: 1}
    )
    return ir.Model(graph, ir_version=10)


def twice_by_a_branch(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
    """2 x where x has one element, 2 x + 100 otherwise; both branches see x and the factor."""
    x = node.inputs[0]
    sizes = op.once("single", lambda home: home.Equal(home.Size(x), home.int(1)))

    def one(inner: Emitter) -> list[Any]:
        factor = inner.once("factor", lambda home: home.float(2.0))
        return [inner.Mul(x, factor)]

    def many(inner: Emitter) -> list[Any]:
        factor = inner.once("factor", lambda home: home.float(2.0))
        return [inner.Add(inner.Mul(x, factor), inner.float(100.0))]

    return (
        op.make("If", sizes, then_branch=op.branch("one", one),
                else_branch=op.branch("many", many)),
    )


def test_expansion_leaves_nothing_of_the_domain_and_runs(tmp_path: Path) -> None:
    model = carried_model()
    assert expand(model, {"Twice": twice_by_a_branch}) == 2
    assert {n.domain for n in model.graph.all_nodes()} == {""}
    assert DOMAIN not in model.opset_imports
    top = [n.op_type for n in model.graph]
    assert top == ["Size", "Constant", "Equal", "Constant", "If", "Neg", "If"]
    every = names(list(model.graph.all_nodes()))
    assert len(every) == len(set(every))
    assert [v.name for v in model.graph.outputs] == ["last"]
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (single,) = session.run(None, {"x": np.array([3.0], np.float32)})
    assert single.tolist() == [-12.0]
    (several,) = session.run(None, {"x": np.array([3.0, 1.0], np.float32)})
    assert several.tolist() == [-(6 + 100) * 2 + 100, -(2 + 100) * 2 + 100]


def test_results_take_over_shapes_types_and_names() -> None:
    model = carried_model()

    def expansion(op: Emitter, node: ir.Node) -> tuple[Any, ...]:
        return (op.Add(node.inputs[0], node.inputs[0]),)

    expand(model, {"Twice": expansion})
    for node in model.graph:
        (value,) = node.outputs
        assert value.type == FLOAT
        assert value.shape == ir.Shape(["N"])
    assert [n.op_type for n in model.graph] == ["Add", "Neg", "Add"]


def test_another_domain_is_imported() -> None:
    model = carried_model()
    expand(model, {"Twice": lambda op, node: (
        op.make("Gelu", *node.inputs, domain="com.microsoft"),
    )})
    assert dict(model.opset_imports) == {"": 21, "com.microsoft": 1}


def test_an_operator_without_a_form_is_an_error() -> None:
    with pytest.raises(KeyError, match="Twice"):
        expand(carried_model(), {})


def test_a_model_without_carried_nodes_stays_as_it_is() -> None:
    x = ir.Value(name="x", type=INT64, shape=ir.Shape([1]))
    node = ir.node("Neg", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], name="g", opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    assert expand(model, {}) == 0
    assert [n.op_type for n in model.graph] == ["Neg"]
    assert dict(model.opset_imports) == {"": 21}
