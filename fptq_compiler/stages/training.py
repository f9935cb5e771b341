"""The stages that train, block-wise and end to end: their parts by the recipe, and the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fptq_compiler.graph.edges import online_map
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.blockwise import train_blocks
from fptq_compiler.optimize.compute_type import faster_type
from fptq_compiler.optimize.corrections import insert_corrections
from fptq_compiler.optimize.objective import Objective, objective
from fptq_compiler.optimize.ranks import ranks, rows_of_rank
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.trainable import Group, trainable
from fptq_compiler.optimize.training import Keeper, Plan, train
from fptq_compiler.passes.scale_outputs import ScaleOutputs
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe, TrainingRecipe
from fptq_compiler.report import Report
from fptq_compiler.transforms import Map
from fptq_compiler.transforms.dense import shared_evaluation
from fptq_compiler.work import TrainingFile


def trained_maps(program: Program, recipe: Recipe) -> tuple[Map, ...]:
    """The merged maps that are trained; the residual's only where the recipe says so.

    None where GPTQ rounds the weights: they are trained as its codes, which maps would turn away
    from their grid.
    """
    if not recipe.trains or recipe.rounds_by_gptq:
        return ()
    online = {online_map(program, node) for node in program.graph.nodes}
    return tuple(
        transform for name, transform in program.maps.items()
        if (name != "residual" or recipe.training.residual)
        and transform.has_parameters and transform not in online
    )


@dataclass(frozen=True)
class TrainingStage:
    """The stages that train, with all that they need beside the quantised program.

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
        """Train the maps and ranges of a calibrated program: block by block, then as a whole.

        Raises:
            OptimizationError: too little text, or a loss that is not finite.
        """
        chosen = recipe.training
        batches = Batches.split(
            self.rows, held_out=chosen.held_out, size=chosen.batch, seed=recipe.seed
        )
        compute = _compute_type(chosen.compute, program.device)
        insert_corrections(program, chosen.weights, rank=chosen.rank, seed=recipe.seed)
        with trainable(
            program, self.maps,
            transforms_rate=chosen.transforms_rate, matrices_rate=recipe.matrices_rate,
            weights_rate=chosen.weights_rate, activations_rate=chosen.activations_rate,
            zero_points_rate=chosen.zero_points_rate,
            correction_rate=chosen.correction_rate,
        ) as groups:
            learner = program.copy()
            run_passes(learner, (ScaleOutputs(),))
            if recipe.blockwise.steps > 0:
                with report.stage("block-wise training"):
                    self._train_blocks(
                        learner, groups, batches, compute, recipe, report, progress
                    )
            if chosen.steps > 0:
                with report.stage("end-to-end training"):
                    self._train_end_to_end(
                        learner, groups, batches, compute, recipe, report, progress
                    )

    def _train_blocks(
        self, program: Program, groups: Sequence[Group], batches: Batches, compute: torch.dtype,
        recipe: Recipe, report: Report, progress: Progress,
    ) -> None:
        chosen = recipe.blockwise
        states = train_blocks(
            program, self.transformed, _without_residual(groups, chosen.rate), batches,
            _plan(recipe.training, chosen.steps),
            inputs=chosen.inputs, compute=compute, keeper=TrainingFile(None), progress=progress,
        )
        for name, state in states.items():
            report.curves[name] = state.losses
            report.curves[f"{name}, held out"] = [*state.held_out.values()]
        first = statistics.mean(state.held_out[0] for state in states.values())
        best = statistics.mean(state.held_out[state.best_step] for state in states.values())
        report.decisions.append(
            f"trained {len(states)} blocks for {chosen.steps} steps each: held-out relative "
            f"error, in the mean over blocks, {first:.4f} -> {best:.4f}"
        )

    def _train_end_to_end(
        self, program: Program, groups: Sequence[Group], batches: Batches, compute: torch.dtype,
        recipe: Recipe, report: Report, progress: Progress,
    ) -> None:
        chosen = recipe.training
        goal = objective(
            chosen.objective, chosen.top_k, remember_teacher=chosen.remember_teacher
        )
        taught = self.transformed if chosen.objective == "hidden-mse" else self.original
        trained = [p for group in groups for p in group.parameters.values()]
        sharded = chosen.sharded and ranks() > 1
        teacher = Student(taught, trained, compute=compute, sharded=sharded)
        student = Student(
            program, trained,
            compute=compute, checkpointing=chosen.checkpointing, sharded=sharded,
        )
        with teacher.released(), student.released():
            seconds = _seconds_of_a_step(student, teacher, groups, batches, goal)
            progress.start(
                f"end-to-end training: {chosen.steps} steps of {chosen.batch} x "
                f"{self.rows.shape[1]} tokens in {str(compute).removeprefix('torch.')}, "
                f"about {seconds * chosen.steps / 60:.0f} min",
                chosen.steps,
            )
            state = train(
                student, teacher, groups, batches, _plan(chosen, chosen.steps),
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


def _plan(chosen: TrainingRecipe, steps: int) -> Plan:
    return Plan(steps, chosen.warmup, chosen.clip, chosen.evaluate_every, chosen.patience)


def _without_residual(groups: Sequence[Group], factor: float) -> list[Group]:
    """The groups without T_r, which every block reads, their rates times a factor."""
    return [
        Group(
            group.name, group.rate * factor,
            {n: p for n, p in group.parameters.items() if not n.startswith("residual/")},
        )
        for group in groups
    ]


def _compute_type(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return faster_type(device)
    found: torch.dtype = getattr(torch, name)
    return found


def _seconds_of_a_step(
    student: Student, teacher: Student, groups: Sequence[Group], batches: Batches, goal: Objective
) -> float:
    """How long one step takes: the second of two, whose gradients are dropped."""
    seconds = 0.0
    for _ in range(2):  # the first one also fetches memory from the system
        started = time.perf_counter()
        with shared_evaluation(student.program.module):
            torch.autograd.backward(goal(student, teacher, rows_of_rank(batches.at(0))))
        for group in groups:
            for parameter in group.parameters.values():
                parameter.grad = None
        seconds = time.perf_counter() - started
    return seconds
