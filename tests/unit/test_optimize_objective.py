"""Objectives: by their recipe names, zero for the teacher itself, their gradient the student's."""

from collections.abc import Iterator

import pytest
import torch

from fptq_compiler.graph.evaluate import Watcher
from fptq_compiler.optimize.divergence import forward_kl, jensen_shannon, top_k_kl
from fptq_compiler.optimize.objective import objective
from fptq_compiler.optimize.student import Student
from fptq_compiler.recipe_training import OBJECTIVES
from tests.quantized_toy import Quantized, groups_of, parameters_of, quantized

PAIRS = ([0, 1], [1, 2])


@pytest.fixture(scope="module")
def toy() -> Iterator[Quantized]:
    with quantized() as made:
        yield made


@torch.no_grad()
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teacher_itself_has_no_distance(toy: Quantized, name: str) -> None:
    teacher = Student(toy.transformed)
    assert abs(float(objective(name, 8)(teacher, teacher, toy.rows[:2]))) < 1e-6
    assert float(objective(name, 8)(Student(toy.program), teacher, toy.rows[:2])) > 1e-4


@torch.no_grad()
def test_names_are_what_they_say(toy: Quantized) -> None:
    student, teacher, ids = Student(toy.program), Student(toy.original), toy.rows[:2]
    logits = student(ids), teacher(ids)
    found = {name: objective(name, 8)(student, teacher, ids) for name in OBJECTIVES[:3]}
    assert torch.equal(found["jensen-shannon"], jensen_shannon(*logits))
    assert torch.equal(found["forward-kl"], forward_kl(*logits))
    assert torch.equal(found["top-k-kl"], top_k_kl(*logits, k=8))
    assert len({float(value) for value in found.values()}) == 3


@torch.no_grad()
def test_a_remembered_teacher_is_asked_once_about_a_sequence(toy: Quantized) -> None:
    asked: list[torch.Tensor] = []

    class Asked(Student):
        def __call__(self, ids: torch.Tensor, watch: Watcher | None = None) -> torch.Tensor:
            asked.append(ids)
            return super().__call__(ids, watch)

    student, teacher, goal = (
        Student(toy.program), Asked(toy.original), objective("top-k-kl", 8, remember_teacher=True)
    )
    expected = [float(objective("top-k-kl", 8)(student, teacher, toy.rows[i])) for i in PAIRS]
    asked.clear()
    for _ in range(2):
        found = [float(goal(student, teacher, toy.rows[i])) for i in PAIRS]
        assert found == pytest.approx(expected, rel=1e-5)
    assert torch.equal(torch.cat(asked), toy.rows[:3])


@torch.no_grad()
def test_hidden_states_are_compared_in_units_of_the_teachers(toy: Quantized) -> None:
    student, teacher, ids = Student(toy.program), Student(toy.transformed), toy.rows[:2]
    expected = teacher.hidden(ids)
    error = (student.hidden(ids) - expected).square().sum() / expected.square().sum()
    assert float(objective("hidden-mse", 0)(student, teacher, ids)) == pytest.approx(float(error))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_all_that_is_trained(toy: Quantized, name: str) -> None:
    with groups_of(toy) as groups:
        parameters = parameters_of(groups)
        student, teacher = Student(toy.program, parameters), Student(toy.transformed)
        loss = objective(name, 8)(student, teacher, toy.rows[:2])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        named = [f"{group.name}: {n}" for group in groups for n in group.parameters]
    unused = {
        n for n, g in zip(named, gradients, strict=True)
        if g is None or (not g.any() and not n.startswith("zero-points"))  # nothing is clipped
    }
    (head,) = [q.module for q in toy.program.activation_quantizers if q.role == "head input"]
    own = {f"activation scales: {head}/scale", f"zero-points: {head}/zero_point"}
    assert unused == (own if name == "hidden-mse" else set())  # it ends in front of the head


def test_a_teacher_of_hidden_states_turns_with_the_residual_map() -> None:
    """Both have the map on their edges, so the distance is that of the quantisers alone."""
    with quantized(residual=True) as toy, groups_of(toy) as groups:
        parameters = parameters_of(groups)
        named = [pair for group in groups for pair in group.parameters.items()]
        (turn,) = [p for n, p in named if n.startswith("residual/")]
        teacher, ids = Student(toy.transformed, parameters), toy.rows[:2]
        before = teacher.hidden(ids).detach()
        with torch.no_grad():
            turn.add_(0.3 * torch.randn(turn.shape, generator=torch.Generator().manual_seed(0)))
        after = teacher.hidden(ids).detach()
        assert (after - before).abs().max() > 0.1 * before.abs().max()
        # a rotation: each token keeps its length, in float32
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4, atol=0)
