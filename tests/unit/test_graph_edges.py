"""Edges: maps between parameters and readers, inserted and folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.edges import (
    GainEdge,
    chains,
    fold,
    insert_edge,
    insert_map,
    insert_online,
    is_online,
    weight_end,
)
from fptq_compiler.graph.program import Program
from fptq_compiler.transforms import Affine, Diagonal, Hadamard, Map, Port, Side

aten = torch.ops.aten


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def program() -> Program:
    """y = down(up(x)), and a second reader of up's weight: two get_attr nodes, as exports have."""
    root = nn.Module()
    root.up = nn.Parameter(_random(8, 4, seed=1), requires_grad=False)
    root.down = nn.Parameter(_random(4, 8, seed=2), requires_grad=False)
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    up = graph.call_function(aten.linear.default, (x, graph.get_attr("up")))
    down = graph.call_function(aten.linear.default, (up, graph.get_attr("down")))
    again = graph.call_function(aten.linear.default, (x, graph.get_attr("up")))
    graph.output((down, again))
    return Program(fx.GraphModule(root, graph), ())


X = _random(3, 4, seed=3)


def _run(program: Program) -> tuple[Tensor, Tensor]:
    program.module.recompile()
    with torch.no_grad():
        return program.module(X)


def _moved(transform: Map) -> Map:
    transform.randomize_(torch.Generator().manual_seed(4), 0.5)
    return transform


PORTS = [Port("up", Side.OUT, False), Port("down", Side.IN, False)]


def test_insert_puts_a_node_on_every_edge(program: Program) -> None:
    insert_map(program, "updown", Diagonal(8), PORTS)
    assert dump(program.module) == (
        "x = input\n"
        "edges_updown_0 = [edges.updown.0](%up)\n"
        "linear_default = linear(x, edges_updown_0)\n"
        "edges_updown_2 = [edges.updown.1](%down)\n"
        "linear_default_1 = linear(linear_default, edges_updown_2)\n"
        "edges_updown_1 = [edges.updown.0](%up)\n"
        "linear_default_2 = linear(x, edges_updown_1)\n"
        "return [linear_default_1, linear_default_2]\n"
    )
    assert list(program.maps) == ["updown"]


def test_the_product_is_kept_and_both_readers_of_the_weight_see_the_map(program: Program) -> None:
    product, single = _run(program)
    transform = _moved(Diagonal(8))
    insert_map(program, "updown", transform, PORTS)
    moved_product, moved_single = _run(program)
    # Float64 sums of eight products: 1e-15 each.
    torch.testing.assert_close(moved_product, product, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        expected = single @ transform.matrix()
    torch.testing.assert_close(moved_single, expected, rtol=1e-13, atol=1e-13)


def test_edges_follow_each_other_and_fold_in_their_order(program: Program) -> None:
    gain = _random(4, seed=5)
    insert_edge(program, "edges.gain", "up", GainEdge(gain))
    insert_map(program, "value", _moved(Affine(1, 8)), PORTS)
    insert_map(program, "updown", _moved(Diagonal(8)), PORTS)
    assert {name: len(edges) for name, edges in chains(program).items()} == {"up": 3, "down": 2}
    before = _run(program)
    assert fold(program) == 2
    assert chains(program) == {}
    assert "edges" not in dump(program.module)
    # No tolerance: a float64 fold evaluates the very modules that stood on the edges.
    assert all(a.equal(b) for a, b in zip(_run(program), before, strict=True))
    assert fold(program) == 0


def test_folding_keeps_name_and_dtype(program: Program) -> None:
    program.module.up = nn.Parameter(program.module.up.float(), requires_grad=False)
    insert_map(program, "updown", _moved(Diagonal(8)), [Port("up", Side.OUT, False)])
    fold(program)
    assert program.parameter("up").dtype == torch.float32
    assert not program.parameter("up").requires_grad


def test_a_range_of_a_packed_weight(program: Program) -> None:
    """Rows 2 to 6 take the map, the others stay as they are."""
    before = program.parameter("up").clone()
    transform = _moved(Affine(2, 2))
    insert_map(program, "value", transform, [Port("up", Side.OUT, False, 1, 2, 6)])
    fold(program)
    after = program.parameter("up")
    assert after[:2].equal(before[:2])
    assert after[6:].equal(before[6:])
    with torch.no_grad():
        expected = transform.matrix().mT @ before[2:6]
    # Float64 sums of four products.
    torch.testing.assert_close(after[2:6], expected, rtol=1e-13, atol=1e-13)


def test_a_parameter_that_nobody_reads(program: Program) -> None:
    with pytest.raises(ValueError, match=r"^edge edges.t.0: no node reads the parameter gate$"):
        insert_map(program, "t", Diagonal(8), [Port("gate", Side.OUT, False)])


def test_a_map_that_does_not_fit_names_the_parameter(program: Program) -> None:
    insert_map(program, "t", Diagonal(5), [Port("up", Side.OUT, False)])
    with pytest.raises(ValueError, match=r"^up, side out: Diagonal 5 with repeat 1 acts on 5"):
        fold(program)


def test_online(program: Program) -> None:
    product, _ = _run(program)
    transform = Hadamard(8)
    down = program.node("linear_default_1")
    insert_map(program, "hadamard", transform, [Port("down", Side.IN, False)])
    edge = insert_online(program, "hadamard", transform, down)
    assert down.args[0] is edge
    assert is_online(program, edge)
    assert not is_online(program, program.node("linear_default"))
    # Float64 sums of eight products, scaled by the root of eight.
    torch.testing.assert_close(_run(program)[0], product, rtol=1e-13, atol=1e-13)
    fold(program)
    assert is_online(program, edge)  # the fold leaves what is computed at run time
    torch.testing.assert_close(_run(program)[0], product, rtol=1e-13, atol=1e-13)


def test_weight_end(program: Program) -> None:
    insert_map(program, "updown", Diagonal(8), PORTS)
    insert_map(program, "value", Affine(1, 8), PORTS)
    down = program.node("linear_default_1")
    weight, source = down.args[1], down.args[0]
    assert isinstance(weight, fx.Node)
    assert isinstance(source, fx.Node)
    end = weight_end(program, weight)
    assert end is not None
    assert end.target == "down"
    assert weight_end(program, source) is None


def test_the_gain_multiplies_the_columns(program: Program) -> None:
    gain = _random(4, seed=6)
    weight = program.parameter("up")
    insert_edge(program, "edges.gain", "up", GainEdge(gain))
    _, found = _run(program)
    # Float64 sums of four products.
    torch.testing.assert_close(found, functional.linear(X * gain, weight), rtol=1e-13, atol=1e-13)
