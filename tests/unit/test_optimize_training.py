"""The loop: it learns, keeps what was best on held-out text, and says where a loss went wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fptq_compiler.errors import OptimizationError
from fptq_compiler.optimize import training
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.objective import objective
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.trainable import Group
from fptq_compiler.optimize.training import Plan, held_out_loss, train
from fptq_compiler.optimize.training_state import TrainingState
from fptq_compiler.progress import SilentProgress
from tests.quantized_toy import Quantized, groups_of, parameters_of, quantized


@pytest.fixture
def toy() -> Iterator[Quantized]:
    with quantized() as made:
        yield made


@dataclass
class Memory:
    """Keeps states, and gives none back."""

    states: list[dict[str, Any]] = field(default_factory=list)

    def load(self) -> None:
        return None

    def save(self, state: dict[str, Any]) -> None:
        self.states.append(state)


GOAL = objective("jensen-shannon", 0)


def trained(toy: Quantized, groups: list[Group], **plan: Any) -> tuple[TrainingState, Student]:
    """Train; give how it ended, and the student."""
    chosen = {"steps": 16, "warmup": 0.1, "clip": 1.0, "evaluate_every": 4, "patience": 0, **plan}
    student = Student(toy.program, parameters_of(groups))
    state = train(
        student, Student(toy.original), groups, split(toy), Plan(**chosen),
        objective=GOAL, keeper=Memory(), progress=SilentProgress(),
    )
    return state, student


def split(toy: Quantized) -> Batches:
    return Batches.split(toy.rows, held_out=2, size=3, seed=0)


def test_it_lowers_the_held_out_loss(toy: Quantized) -> None:
    before = {n: p.clone() for n, p in toy.program.module.named_parameters()}
    with groups_of(toy) as groups:
        state, student = trained(toy, groups)
        found = held_out_loss(student, Student(toy.original), split(toy), GOAL)
    assert list(state.held_out) == [0, 4, 8, 12, 16]
    assert len(state.losses) == len(state.seconds) == 16
    assert found == min(state.held_out.values()) < 0.9 * state.held_out[0]
    weights = [n for n in before if n.startswith(("model.", "lm_head.")) and "weight" in n]
    assert weights
    assert all(torch.equal(toy.program.parameter(n), before[n]) for n in weights)


def test_the_best_state_is_kept_where_the_last_is_not_it(
    toy: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values after four steps, whatever the eight worse ones behind them do."""
    looks: list[list[Tensor]] = []
    said = iter([3.0, 1.0, 2.0, 2.5])

    def judged(student: Student, *_: object) -> float:
        looks.append([p.detach().clone() for p in parameters])
        return next(said)

    monkeypatch.setattr(training, "held_out_loss", judged)
    with groups_of(toy) as groups:
        parameters = parameters_of(groups)
        state, _ = trained(toy, groups, steps=12)
        assert state.best_step == 4
        assert all(torch.equal(p, v) for p, v in zip(parameters, looks[1], strict=True))
        assert not any(torch.equal(p, v) for p, v in zip(parameters, looks[3], strict=True)
                       if p.grad is not None and p.grad.any())


def test_it_ends_early_where_nothing_gets_better(
    toy: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter([3.0, 1.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(training, "held_out_loss", lambda *_: next(said))
    with groups_of(toy) as groups:
        state, _ = trained(toy, groups, steps=30, evaluate_every=2, patience=2)
    assert state.step == 6
    assert state.best_step == 2


def test_the_same_seed_trains_the_same(toy: Quantized) -> None:
    found = []
    for _ in range(2):
        with quantized() as made, groups_of(made) as groups:
            state, _ = trained(made, groups, steps=3)
            values = [p.detach().clone() for p in parameters_of(groups)]
        found.append((state.losses, values))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_loss_that_is_not_finite_names_the_node_and_its_line(toy: Quantized) -> None:
    weight = toy.program.parameter("model.layers.1.self_attn.o_proj.weight")
    with groups_of(toy) as groups:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(OptimizationError) as caught:
            trained(toy, groups)
    words = str(caught.value)
    found = re.search(r"step 1: the loss is nan.* finite is at (\S+) \((.*)\)\.", words)
    assert found is not None, words
    assert "layers_1_self_attn" in found[1]
    assert re.search(r"toys\.py\D+\d+", found[2])


def test_a_gradient_that_is_not_finite_names_the_parameter(toy: Quantized) -> None:
    with groups_of(toy) as groups:
        name = "updown.model.layers.0.mlp/log_scale"
        hook = groups[0].parameters[name].register_hook(lambda gradient: gradient / 0.0)
        expected = rf"step 1: the gradient of transforms {re.escape(name)} is not finite"
        with pytest.raises(OptimizationError, match=expected):
            trained(toy, groups)
        hook.remove()


def test_states_are_handed_to_the_keeper(toy: Quantized) -> None:
    keeper = Memory()
    with groups_of(toy) as groups:
        train(
            Student(toy.program, parameters_of(groups)), Student(toy.original), groups,
            split(toy), Plan(10, 0.1, 1.0, 20, 0),
            objective=GOAL, keeper=keeper, progress=SilentProgress(),
        )
    assert [state["step"] for state in keeper.states] == [10, 10]  # every ten, and at the end
