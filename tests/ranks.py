"""One training step of a toy, and what each rank finds in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.objective import objective
from fptq_compiler.optimize.ranks import average_gradients, mean_over_ranks, rank, rows_of_rank
from fptq_compiler.optimize.shards import frozen_matrices
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.trainable import trainable
from fptq_compiler.processes import joined
from fptq_compiler.progress import SilentProgress
from fptq_compiler.report import Report
from fptq_compiler.stages import quantize
from fptq_compiler.stages.training import TrainingStage
from fptq_compiler.transforms.dense import shared_evaluation
from fptq_compiler.work import TrainingFile
from tests.compiling import SMALL
from tests.toys import make_tokens
from tests.training import TRAINED, before_training, train_toy


@dataclass
class Gradients:
    """Of one training step: the stage that takes it, and what it finds.

    Attributes:
        stage: of the toy.
        sharded, checkpointing: as in the recipe.
        loss: the mean over the ranks.
        found: by parameter.
        resident: bytes that the matrices of student and teacher take between two blocks.
        gathered: how many sharded ones are whole there.
    """

    stage: TrainingStage
    sharded: bool = False
    checkpointing: bool = False
    loss: float = 0.0
    found: dict[str, Tensor] = field(default_factory=dict)
    resident: int = 0
    gathered: int = 0

    def run(self, program: Program, *rest: object) -> None:
        trained = ("transforms", "matrices", "weights", "activations", "zero_points")
        rates = {f"{x}_rate": 1.0 for x in trained}
        with trainable(program, self.stage.maps, **rates) as groups:
            named = {f"{g.name}: {k}": p for g in groups for k, p in g.parameters.items()}
            teacher = Student(self.stage.original, sharded=self.sharded)
            student = Student(
                program, [*named.values()], sharded=self.sharded,
                checkpointing=self.checkpointing,
            )
            with teacher.released(), student.released(), shared_evaluation(program.module):
                ids = rows_of_rank(self.stage.rows[:2])
                loss = objective("jensen-shannon", 0)(student, teacher, ids)
                loss.backward()
                self.resident = _matrix_bytes(student) + _matrix_bytes(teacher)
                self.gathered = _gathered(student) + _gathered(teacher)
            average_gradients(named.values())
            self.loss = mean_over_ranks(loss.detach())
            self.found = {k: p.grad.clone() for k, p in named.items() if p.grad is not None}

    @classmethod
    def of_toy(cls, *, sharded: bool = False, checkpointing: bool = False) -> dict[str, Any]:
        """What is found, by the attribute's name."""
        program, stage = before_training()
        made = cls(stage, sharded, checkpointing)
        report = Report(origin="toy", recipe="", seed=0)
        ids = make_tokens(SMALL, 4, 16)
        quantize(program, TRAINED, ids, report, SilentProgress(), training=made)
        return {x: getattr(made, x) for x in ("loss", "found", "resident", "gathered")}


def _matrix_bytes(student: Student) -> int:
    held = {id(p): p.nbytes for p in frozen_matrices(student.program, ()).values()}
    shards = [w for part in student._shards for w in part.weights]
    return sum(held.values()) + sum(w.to_local().nbytes for w in shards)


def _gathered(student: Student) -> int:
    """How many sharded weights are whole, outside their block's run."""
    return sum(not isinstance(w, DTensor) for part in student._shards for w in part.weights)


def train(folder: Path) -> None:
    """What each of two ranks finds goes to a file of its own."""
    with joined("cpu"):
        found: dict[str, Any] = {
            "plain": Gradients.of_toy(),
            "sharded": Gradients.of_toy(sharded=True),
            "checkpointed": Gradients.of_toy(sharded=True, checkpointing=True),
        }
        found["values"], found["losses"] = train_toy(TrainingFile(folder / f"kept{rank()}.pt"))
        torch.save(found, folder / f"found{rank()}.pt")
