"""The end-to-end stage of a compilation: its parts by the recipe, and what is reported."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fptq_compiler.graph.edges import online_map
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import held_for_many_runs
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.compute_type import faster_type
from fptq_compiler.optimize.objective import Objective, objective
from fptq_compiler.optimize.ranks import rows_of_rank
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.trainable import Group, trainable
from fptq_compiler.optimize.training import Keeper, Plan, train
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.transforms import Map
from fptq_compiler.transforms.dense import shared_evaluation


def trained_maps(program: Program, recipe: Recipe) -> tuple[Map, ...]:
    """The merged maps that the stage trains; the residual's only where the recipe says so."""
    if not recipe.trains:
        return ()
    online = {online_map(program, node) for node in program.graph.nodes}
    return tuple(
        transform for name, transform in program.maps.items()
        if (name != "residual" or recipe.training.residual)
        and transform.has_parameters and transform not in online
    )


@dataclass(frozen=True)
class TrainingStage:
    """The stage with all that it needs beside the quantised program.

    Attributes:
        original: the model as captured.
        transformed: with the transforms, whose maps are the program's own, in float.
        maps: what `trained_maps` gave when the others were folded.
        rows: token ids (N, S).
        keeper: keeps the state, for a run that goes on.
    """

    original: Program
    transformed: Program
    maps: tuple[Map, ...]
    rows: Tensor
    keeper: Keeper

    def run(self, program: Program, recipe: Recipe, report: Report, progress: Progress) -> None:
        """Train the maps and ranges of a calibrated program.

        Raises:
            OptimizationError: too little text, or a loss that is not finite.
        """
        chosen = recipe.training
        batches = Batches.split(
            self.rows, held_out=chosen.held_out, size=chosen.batch, seed=recipe.seed
        )
        compute = _compute_type(chosen.compute, program.device)
        goal = objective(chosen.objective, chosen.top_k)
        taught = self.transformed if chosen.objective == "hidden-mse" else self.original
        with (
            held_for_many_runs(program.module),
            held_for_many_runs(taught.module),
            trainable(
                program, self.maps,
                transforms_rate=chosen.transforms_rate, weights_rate=chosen.weights_rate,
                activations_rate=chosen.activations_rate,
                zero_points_rate=chosen.zero_points_rate,
            ) as groups,
        ):
            teacher = Student(taught, compute=compute)
            student = Student(
                program, [p for group in groups for p in group.parameters.values()],
                compute=compute, checkpointing=chosen.checkpointing,
            )
            seconds = _seconds_of_a_step(student, teacher, groups, batches, goal)
            progress.start(
                f"end-to-end training: {chosen.steps} steps of {chosen.batch} x "
                f"{self.rows.shape[1]} tokens in {str(compute).removeprefix('torch.')}, "
                f"about {seconds * chosen.steps / 60:.0f} min",
                chosen.steps,
            )
            state = train(
                student, teacher, groups, batches,
                Plan(
                    chosen.steps, chosen.warmup, chosen.clip, chosen.evaluate_every,
                    chosen.patience,
                ),
                objective=goal, keeper=self.keeper, progress=progress,
            )
            progress.done()
        if state.seconds:
            report.tokens_per_second = (
                chosen.batch * self.rows.shape[1] / statistics.median(state.seconds)
            )
        report.curves["end to end"] = state.losses
        report.curves["end to end, held out"] = [*state.held_out.values()]
        first, best = state.held_out[0], state.held_out[state.best_step]
        report.decisions.append(
            f"trained end to end for {state.step} steps: held-out {chosen.objective} "
            f"{first:.4f} -> {best:.4f}, best after step {state.best_step}"
        )


def _compute_type(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return faster_type(device)
    found: torch.dtype = getattr(torch, name)
    return found


def _seconds_of_a_step(
    student: Student, teacher: Student, groups: list[Group], batches: Batches, goal: Objective
) -> float:
    """How long one step takes, by a step whose gradients are dropped."""
    started = time.perf_counter()
    with shared_evaluation(student.program.module):
        goal(student, teacher, rows_of_rank(batches.at(0))).backward()  # type: ignore[no-untyped-call]
    for group in groups:
        for parameter in group.parameters.values():
            parameter.grad = None
    return time.perf_counter() - started
