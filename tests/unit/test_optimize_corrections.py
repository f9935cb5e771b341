"""Corrections of weights: nothing at first, the last on their edges, merged with the maps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fptq_compiler.graph.edges import DeltaEdge, Edge, LowRankEdge, chains, fold, split
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.corrections import insert_corrections
from tests.quantized_toy import Quantized, groups_of, quantized

KINDS = {"lora": LowRankEdge, "full": DeltaEdge}


@pytest.fixture
def toy() -> Iterator[Quantized]:
    with quantized() as made:
        yield made


def linears(program: Program) -> list[str]:
    return [q.parameter for q in program.weight_quantizers if q.role == "linear"]


def corrected(program: Program) -> dict[str, Edge]:
    """The last edge of every linear's weight."""
    return {name: edges[-1] for name, edges in chains(program).items() if name in linears(program)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_has_one_behind_its_maps_in_front_of_its_quantiser(
    toy: Quantized, kind: str
) -> None:
    before = chains(toy.program)
    insert_corrections(toy.program, kind, rank=3, seed=0)
    after = chains(toy.program)
    assert {n for n in after if len(after[n]) > len(before.get(n, []))} == {*linears(toy.program)}
    for name, edge in corrected(toy.program).items():
        assert after[name] == [*before.get(name, []), edge]
        assert type(edge) is KINDS[kind]
    nodes = {n.target: n for n in toy.program.graph.nodes if n.op == "call_module"}
    for quantizer in toy.program.weight_quantizers:
        if quantizer.role == "linear":
            source = input_node(nodes[quantizer.module])
            edge = toy.program.module.get_submodule(str(source.target))
            assert edge is corrected(toy.program)[quantizer.parameter]


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_it_changes_nothing(toy: Quantized, kind: str) -> None:
    ids = toy.rows[:2]
    before = toy.program.run(ids)
    insert_corrections(toy.program, kind, rank=3, seed=0)
    assert torch.equal(toy.program.run(ids), before)


def test_none_is_none(toy: Quantized) -> None:
    before = len(toy.program.graph.nodes)
    insert_corrections(toy.program, "none", rank=3, seed=0)
    assert len(toy.program.graph.nodes) == before


@pytest.mark.parametrize(("kind", "parameters"), [("lora", ("left", "right")),
                                                  ("full", ("delta",))])
def test_its_parameters_are_a_group(
    toy: Quantized, kind: str, parameters: tuple[str, ...]
) -> None:
    insert_corrections(toy.program, kind, rank=3, seed=0)
    with groups_of(toy) as groups:
        (group,) = [g for g in groups if g.name == "weight corrections"]
        expected = {f"{name}/{key}" for name in linears(toy.program) for key in parameters}
        assert set(group.parameters) == expected
    with groups_of(toy, correction_rate=0.0) as groups:
        assert "weight corrections" not in [g.name for g in groups]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_added_behind_the_maps_and_merged(
    toy: Quantized, kind: str, generator: torch.Generator
) -> None:
    insert_corrections(toy.program, kind, rank=3, seed=0)
    name = "model.layers.1.mlp.down_proj.weight"
    (*maps, edge) = chains(toy.program)[name]
    assert maps
    with torch.no_grad():
        for parameter in edge.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight = toy.program.parameter(name).double()
    for transform in maps:
        weight = transform(weight)
    added = [p.double() for p in edge.parameters()]
    expected = weight + (added[0] @ added[1] if kind == "lora" else added[0])
    before = toy.program.run(toy.rows[:2])
    fold(toy.program)
    assert name not in chains(toy.program)
    assert torch.equal(toy.program.parameter(name), expected.float())
    # float64 products against float32 ones: codes at a tie may flip
    assert (toy.program.run(toy.rows[:2]) - before).abs().mean() < 1e-2 * before.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_it_waits_for_whatever_is_trained_in_front_of_it(toy: Quantized, kind: str) -> None:
    """Added to a weight whose map is still to come, it would be transformed as well."""
    insert_corrections(toy.program, kind, rank=3, seed=0)
    (*maps, edge) = chains(toy.program)["model.layers.1.mlp.down_proj.weight"]
    assert split([*maps, edge], toy.maps) == ([], [*maps, edge])
    assert split([*maps, edge], [edge]) == (maps, [edge])
    assert split([*maps, edge], []) == ([*maps, edge], [])
    assert split([edge, *maps], [edge]) == ([], [edge, *maps])
