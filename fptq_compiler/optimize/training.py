"""Stage two of FPTQuant: the quantised student learns the original's next-token distributions.

Transforms and quantiser ranges are trained together, with gradients straight through the rounding
of the merged weights and of the activations (arXiv 2506.04985, section 3; LSQ, arXiv 1902.08153).
The state that is best on held-out text is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fptq_compiler.errors import OptimizationError
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.ranks import (
    average_gradients,
    mean_over_ranks,
    mean_over_rows,
    rows_of_rank,
)
from fptq_compiler.optimize.schedule import rate_factor
from fptq_compiler.optimize.trainable import Group
from fptq_compiler.optimize.training_state import TrainingState
from fptq_compiler.progress import Progress
from fptq_compiler.transforms.dense import shared_evaluation

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Plan:
    """How long and how fast; the fields are those of the recipe's `[training]`."""

    steps: int
    warmup: float
    clip: float
    evaluate_every: int
    patience: int


class Keeper(Protocol):
    """Where a state is kept, so that a stopped training goes on."""

    def load(self) -> dict[str, object] | None:
        """The last state that was kept, or None."""

    def save(self, state: dict[str, object]) -> None:
        """Keep a state, whole or not at all."""


class Learner(Protocol):
    """What is trained: a whole program, or a block of one."""

    @property
    def module(self) -> nn.Module:
        """Whose maps a step evaluates once."""

    def first_infinite(self, ids: Tensor) -> str | None:
        """The first node whose value is not finite, with its line in the model's code."""


_Student = TypeVar("_Student", bound=Learner)
_Teacher = TypeVar("_Teacher")
Loss = Callable[[_Student, _Teacher, Tensor], Tensor]


def train(
    student: _Student,
    teacher: _Teacher,
    groups: Sequence[Group],
    batches: Batches,
    plan: Plan,
    *,
    objective: Loss[_Student, _Teacher],
    keeper: Keeper,
    progress: Progress,
) -> TrainingState:
    """Train the groups; they end with the values that were best on held-out text.

    Args:
        student: the quantised program, or a block of it.
        teacher: the original, or the student without its quantisers.
        groups: what is trained.
        batches: token ids, or the numbers of what stands in front of a block.
        plan: steps and schedule.
        objective: what is minimised, of student, teacher and a batch.
        keeper: keeps the state every few steps.
        progress: one step each, with the loss.

    Raises:
        OptimizationError: a loss or gradient is not finite; the message names the place.
    """
    parameters = [p for group in groups for p in group.parameters.values()]
    optimizer = torch.optim.Adam(
        [{"params": [*group.parameters.values()], "lr": group.rate} for group in groups],
        betas=BETAS,
    )
    state = TrainingState.start(groups, optimizer, keeper)
    progress.advance(state.step)
    with state.kept_at_the_end():
        while state.step < plan.steps:
            if state.step % plan.evaluate_every == 0:
                state.judge(held_out_loss(student, teacher, batches, objective))
                if state.is_stale(plan.patience):
                    break
            started = time.perf_counter()
            for settings, group in zip(optimizer.param_groups, groups, strict=True):
                settings["lr"] = group.rate * rate_factor(state.step, plan.steps, plan.warmup)
            ids = rows_of_rank(batches.at(state.step))
            optimizer.zero_grad()
            with shared_evaluation(student.module):
                loss = objective(student, teacher, ids)
                mean = mean_over_ranks(loss.detach())
                _refuse_infinite(student, mean, ids, state.step)
                torch.autograd.backward(loss)
            average_gradients(parameters)
            _clip_gradients(groups, plan.clip, state.step)
            state.advance(mean)
            state.seconds.append(time.perf_counter() - started)
            progress.advance(1, state.words())
    state.judge(held_out_loss(student, teacher, batches, objective))
    state.restore_best()
    return state


@torch.no_grad()
def held_out_loss(
    student: _Student, teacher: _Teacher, batches: Batches, objective: Loss[_Student, _Teacher]
) -> float:
    """The objective on the held-out sequences, one at a time."""
    with shared_evaluation(student.module):
        return mean_over_rows(partial(objective, student, teacher), batches.held_out)


def _clip_gradients(groups: Sequence[Group], clip: float, step: int) -> None:
    """Bring the norm of all gradients together down to `clip`; one not finite is an error."""
    named = {
        f"{group.name} {name}": parameter
        for group in groups for name, parameter in group.parameters.items()
        if parameter.grad is not None
    }
    norm = torch.nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None])
    if bool(torch.isfinite(norm)):
        torch.nn.utils.clip_grads_with_norm_(named.values(), clip, norm)
        return
    wrong = [n for n, p in named.items() if p.grad is not None and not p.grad.isfinite().all()]
    message = (
        f"training step {step + 1}: the gradient of {wrong[0] if wrong else 'all together'} is "
        "not finite, expected finite numbers. Lower the rates in [training]"
    )
    raise OptimizationError(message)


def _refuse_infinite(student: Learner, loss: float, ids: Tensor, step: int) -> None:
    """Raise OptimizationError where the loss is not finite, and say where that began."""
    if math.isfinite(loss):
        return
    place = student.first_infinite(ids) or "the loss itself"
    message = (
        f"training step {step + 1}: the loss is {loss}, expected a finite number; "
        f"the first value that is not finite is at {place}. Lower the rates in [training], or "
        "give text that the model knows"
    )
    raise OptimizationError(message)
