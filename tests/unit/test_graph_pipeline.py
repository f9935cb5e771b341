"""The pipeline: facts are checked before anything runs, and a broken pass is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

from fptq_compiler.errors import PassError, UnsupportedModelError
from fptq_compiler.graph.pipeline import Pass, PassResult, check_order, run_passes
from fptq_compiler.graph.program import NearMiss, Program
from fptq_compiler.passes import FIND_SITES, insertion


class First(Pass):
    provides = ("floor",)

    def run(self, program: Program) -> PassResult:
        return PassResult(1, (NearMiss("thing", "x", "almost", "line 3"),))


class BuildRoof(Pass):
    requires = ("floor", "walls")
    provides = ("roof",)
    destroys = ("floor",)

    def run(self, program: Program) -> PassResult:
        return PassResult(2)


class Malform(Pass):
    """Leaves a node that reads one behind it."""

    def run(self, program: Program) -> PassResult:
        nodes = list(program.graph.nodes)
        nodes[-1].prepend(nodes[1])
        return PassResult(1)


class Refuse(Pass):
    def run(self, program: Program) -> PassResult:
        message = "not this model"
        raise UnsupportedModelError(message)


@pytest.fixture
def program() -> Program:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,))
    second = graph.call_function(torch.abs, (first,))
    graph.output((second,))
    return Program(fx.GraphModule(torch.nn.Module(), graph), ())


def test_a_name_is_the_class_in_snake_case() -> None:
    assert BuildRoof().name == "build_roof"


def test_a_missing_fact_names_the_pass_and_what_is_known(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(program, (First(), BuildRoof()))
    assert str(caught.value) == (
        "pass build_roof requires walls, which no pass before it provides; known here: floor"
    )
    assert program.facts == set()  # checked before anything ran


def test_with_no_fact_at_all() -> None:
    with pytest.raises(PassError, match=r"requires floor, walls, .* known here: nothing"):
        check_order((BuildRoof(),), set())


def test_facts_that_the_program_has_count() -> None:
    check_order((First(), BuildRoof()), {"walls"})


def test_a_destroyed_fact_is_gone() -> None:
    with pytest.raises(PassError, match="requires floor, which"):
        check_order((First(), BuildRoof(), BuildRoof()), {"walls"})


def test_facts_and_near_misses_are_kept(program: Program) -> None:
    program.facts.add("walls")
    seen: list[tuple[str, int]] = []
    run_passes(
        program, (First(), BuildRoof()), observe=lambda s, r: seen.append((s.name, r.changed))
    )
    assert program.facts == {"walls", "roof"}
    assert [str(m) for m in program.near_misses] == ["thing at x: almost (line 3)"]
    assert seen == [("first", 1), ("build_roof", 2)]


def test_a_malformed_graph_names_the_pass_and_those_before(program: Program) -> None:
    with pytest.raises(PassError, match=r"^pass malform failed after first: ") as caught:
        run_passes(program, (First(), Malform()))
    assert caught.value.__cause__ is not None


def test_an_error_for_the_user_passes_through(program: Program) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^not this model$"):
        run_passes(program, (Refuse(),))


def test_a_dump_after_each_pass(program: Program, tmp_path: Path) -> None:
    program.facts.add("walls")
    run_passes(program, (First(), BuildRoof()), dump_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["01_first.txt", "02_build_roof.txt"]
    assert (tmp_path / "01_first.txt").read_text(encoding="utf-8") == (
        "x = input\nneg = neg(x)\nabs_1 = abs(neg)\nreturn [abs_1]\n"
    )


def test_the_real_order_holds() -> None:
    names = ("residual", "value", "prerope", "updown", "hadamard", "scaling")
    check_order((*FIND_SITES, *insertion(names, seed=0, scaling_places=("o_proj",))), set())
