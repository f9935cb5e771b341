"""Patterns: what each kind matches and binds, and how a failure names the deepest node."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx import Node

from fptq_compiler.graph.patterns import (
    Alt,
    Commutes,
    Match,
    Maybe,
    NoMatch,
    Op,
    Var,
    deepest,
    match,
    words,
)

aten = torch.ops.aten
ADD, MUL, NEG = (aten.add.Tensor,), (aten.mul.Tensor,), (aten.neg.default,)


class Example:
    """neg(x) * (x + y), and its nodes."""

    def __init__(self) -> None:
        graph = fx.Graph()
        self.x, self.y = graph.placeholder("x"), graph.placeholder("y")
        self.neg = graph.call_function(NEG[0], (self.x,))
        self.add = graph.call_function(ADD[0], (self.x, self.y))
        self.mul = graph.call_function(MUL[0], (self.neg, self.add))
        self.scaled = graph.call_function(MUL[0], (self.add, 2.0))


@pytest.fixture
def example() -> Example:
    return Example()


def _match(pattern: object, value: object) -> Match:
    found = match(pattern, value)  # type: ignore[arg-type]
    assert isinstance(found, Match), found
    return found


def _fail(pattern: object, value: object) -> NoMatch:
    found = match(pattern, value)  # type: ignore[arg-type]
    assert isinstance(found, NoMatch)
    return found


def test_var_binds_anything(example: Example) -> None:
    assert _match(Var("a"), example.mul)["a"] is example.mul
    assert _match(Var("a"), 2.0)["a"] == 2.0


def test_var_twice_must_be_the_same(example: Example) -> None:
    graph = example.x.graph
    square = graph.call_function(MUL[0], (example.x, example.x))
    assert _match(Op(MUL, (Var("a"), Var("a"))), square)["a"] is example.x
    found = _fail(Op(MUL, (Var("a"), Var("a"))), example.mul)
    assert found == NoMatch("add_tensor is not the a that stands elsewhere", example.add, 1)


def test_op_binds_its_node_and_leaves_trailing_arguments_free(example: Example) -> None:
    found = _match(Op(MUL, (Op(NEG, (Var("a"),), "n"),), "m"), example.mul)
    assert (found["a"], found["n"], found["m"]) == (example.x, example.neg, example.mul)
    assert found.nodes == (example.mul, example.neg)  # outermost first


def test_op_matches_literals(example: Example) -> None:
    assert _match(Op(MUL, (Var("a"), Var("factor"))), example.scaled)["factor"] == 2.0
    found = _fail(Op(MUL, (Var("a"), Op(NEG))), example.scaled)
    assert found == NoMatch("expected aten.neg, found 2.0", None, 1)


def test_op_with_too_few_arguments(example: Example) -> None:
    found = _fail(Op(NEG, (Var("a"), Var("b"))), example.neg)
    assert found == NoMatch("aten.neg has 1 arguments", example.neg, 0)


def test_alt_takes_the_first_that_matches(example: Example) -> None:
    assert _match(Alt((Op(NEG, (Var("a"),)), Op(ADD, (Var("b"),)))), example.add)["b"]
    both = Alt((Op(ADD, (Var("first"),)), Op(ADD, (Var("second"),))))
    assert set(_match(both, example.add).bindings) == {"first"}


def test_a_failed_choice_leaves_no_binding(example: Example) -> None:
    wrong = Op(MUL, (Var("a"), Op(NEG)))
    assert _match(Alt((wrong, Op(MUL, (Op(NEG), Var("b"))))), example.mul).bindings == {
        "b": example.add
    }


def test_maybe_goes_through_any_number(example: Example) -> None:
    graph = example.x.graph
    twice = graph.call_function(NEG[0], (example.neg,))
    pattern = Maybe(NEG, Var("inner"))
    for node, depth in ((example.x, 0), (example.neg, 1), (twice, 2)):
        found = _match(pattern, node)
        assert found["inner"] is example.x
        assert len(found.nodes) == depth


def test_commutes_in_either_order(example: Example) -> None:
    for left, right in ((Op(NEG), Var("other")), (Var("other"), Op(NEG))):
        found = _match(Commutes(MUL, left, right, "m"), example.mul)
        assert found["other"] is example.add
        assert found["m"] is example.mul


def test_the_deepest_failure_is_kept(example: Example) -> None:
    """The shallow choice fails at the product, the deep one below the negation."""
    shallow = Op(ADD, (Var("a"),))
    deep = Op(MUL, (Op(NEG, (Op(ADD),)),))
    for choices in ((shallow, deep), (deep, shallow)):
        found = _fail(Alt(choices), example.mul)
        assert found == NoMatch("expected aten.add, found x", example.x, 2)


def test_deepest_keeps_the_first_where_they_tie(example: Example) -> None:
    first, second = NoMatch("one", example.x, 3), NoMatch("two", example.y, 3)
    assert deepest(first, second) is first
    assert deepest(first, NoMatch("deeper", None, 4)).reason == "deeper"


def test_words_are_short_and_ordered() -> None:
    targets = (aten.sub.Tensor, aten.add.Tensor, aten.mul.Scalar)
    assert words(targets) == "aten.add or aten.mul.Scalar or aten.sub"


def test_a_placeholder_is_no_call(example: Example) -> None:
    found = _fail(Op(NEG), example.x)
    assert isinstance(found.node, Node)
    assert found.reason == "expected aten.neg, found x"
