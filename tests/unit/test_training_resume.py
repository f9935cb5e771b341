"""A training that was stopped goes on to the values of one that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fptq_compiler.errors import LoweringError
from fptq_compiler.optimize import training, training_state
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import Recipe
from fptq_compiler.stages import take_in, transforming
from fptq_compiler.work import TrainingFile, WorkFolder
from tests.compiling import SMALL, compile_toy
from tests.toys import export_toy, make_tokens
from tests.training import (
    STEPS,
    TRAINED,
    before_training,
    last_values,
    same_values,
    train_toy,
)


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, Tensor], list[float]]:
    return train_toy()


@pytest.fixture
def file(tmp_path: Path) -> TrainingFile:
    return TrainingFile(tmp_path / "training.pt")


class StoppedError(Exception):
    pass


class StopAfter(SilentProgress):
    """Raises after some training steps."""

    def __init__(self, steps: int, error: type[BaseException]) -> None:
        self.steps, self.error = steps, error

    def advance(self, n: int = 1, note: str = "") -> None:
        if note.startswith("loss"):
            self.steps -= 1
            if self.steps == 0:
                raise self.error


def raising(function: Callable[..., Any], call: int, error: type[BaseException]) -> Any:
    """The function, which raises after its work in the call of that number."""
    calls = iter(range(1, 1000))

    def called(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        if next(calls) == call:
            raise error
        return found

    return called


@pytest.mark.parametrize("error", [KeyboardInterrupt, StoppedError])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_stopped_behind_a_step(
    file: TrainingFile, uninterrupted: tuple[dict[str, Tensor], list[float]], step: int,
    error: type[BaseException],
) -> None:
    with pytest.raises(error):
        train_toy(file, progress=StopAfter(step, error))
    kept = file.load()
    assert kept is not None
    assert kept["step"] == step
    values, losses = train_toy(file)
    assert losses == uninterrupted[1]
    assert same_values(values, uninterrupted[0])


@pytest.mark.parametrize(
    ("place", "call", "kept_step"),
    [("held_out_loss", 2, 2), ("average_gradients", 4, 3), ("rate_factor", 1, 0)],
)
def test_stopped_inside_a_step(
    file: TrainingFile, uninterrupted: tuple[dict[str, Tensor], list[float]],
    monkeypatch: pytest.MonkeyPatch, place: str, call: int, kept_step: int,
) -> None:
    with monkeypatch.context() as patch:
        stopping = raising(getattr(training, place), call, KeyboardInterrupt)
        patch.setattr(training, place, stopping)
        with pytest.raises(KeyboardInterrupt):
            train_toy(file)
    kept = file.load()
    assert kept is not None
    assert kept["step"] == kept_step
    assert same_values(train_toy(file)[0], uninterrupted[0])


def test_a_half_done_optimiser_step_is_not_kept(
    file: TrainingFile, uninterrupted: tuple[dict[str, Tensor], list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_state, "KEEP_EVERY", 2)
    with monkeypatch.context() as patch:
        step = torch.optim.Adam.step
        fourth = raising(step, 4, StoppedError)

        def stopped(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
            # AdamW, of the local stage, may inherit this very function
            ours = type(optimizer) is torch.optim.Adam
            return (fourth if ours else step)(optimizer, *arguments)

        patch.setattr(torch.optim.Adam, "step", stopped)
        with pytest.raises(StoppedError):
            train_toy(file)
    kept = file.load()
    assert kept is not None
    assert kept["step"] == 2
    assert same_values(train_toy(file)[0], uninterrupted[0])


def test_a_full_disk_stops_and_the_next_run_goes_on(
    file: TrainingFile, uninterrupted: tuple[dict[str, Tensor], list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fptq_compiler.work.torch.save", full)
        with pytest.raises(LoweringError, match="No space left on device"):
            train_toy(file)
    assert file.load() is None
    assert same_values(train_toy(file)[0], uninterrupted[0])


@dataclass(frozen=True)
class Damage:
    """What happens to a file; `name` is the test's."""

    name: str
    apply: Callable[[bytes], bytes]


DAMAGES = [
    Damage("empty", lambda kept: b""),
    Damage("half", lambda kept: kept[: len(kept) // 2]),
    Damage("text", lambda kept: b"no state at all"),
    Damage("end", lambda kept: kept[:-1]),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_state_is_not_used(
    file: TrainingFile, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    assert file.path is not None
    file.save({"step": 3, "values": [torch.arange(100.0)]})
    file.path.write_bytes(damage.apply(file.path.read_bytes()))
    assert file.load() is None
    assert "training.pt cannot be read" in caplog.text
    assert "training again" in caplog.text


def test_a_state_of_other_parameters_is_not_used(
    file: TrainingFile, uninterrupted: tuple[dict[str, Tensor], list[float]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file.save({"shapes": {"transforms: value": [3]}, "step": 3})
    values, losses = train_toy(file)
    assert "the kept training has other parameters" in caplog.text
    assert losses == uninterrupted[1]
    assert same_values(values, uninterrupted[0])


def test_a_state_belongs_to_recipe_model_device_and_text(tmp_path: Path) -> None:
    program, ids, rows = take_in(export_toy(SMALL)), make_tokens(SMALL, 2, 8), torch.ones(2, 4)
    other, _ = before_training()

    def path(
        recipe: Recipe = TRAINED, device: str = "cpu", *, model: Any = program, **texts: Tensor
    ) -> Path | None:
        work = WorkFolder(tmp_path, recipe, model, device)
        return work.training(texts.get("ids", ids), texts.get("rows", rows)).path

    changed = [
        path(replace(TRAINED, seed=1)), path(device="cuda"), path(model=other),
        path(ids=ids.flip(0)), path(rows=rows + 1), path(rows=rows.reshape(4, 2)),
    ]
    assert len({path(), *changed}) == 1 + len(changed)
    assert path() == path(device="cpu")
    assert path(device="cuda") == path(device="cuda:1")


def test_the_file_of_a_stopped_compilation_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "whole" / "toy.onnx", tmp_path / "stopped" / "toy.onnx"]
    for path in files:
        path.parent.mkdir()
    works = [tmp_path / "work of whole", tmp_path / "work of stopped"]
    compile_toy(SMALL, TRAINED, files[0], work_dir=works[0])
    with monkeypatch.context() as patch:
        stopping = raising(training.average_gradients, 3, KeyboardInterrupt)
        patch.setattr(training, "average_gradients", stopping)
        with pytest.raises(KeyboardInterrupt):
            compile_toy(SMALL, TRAINED, files[1], work_dir=works[1])
    assert not files[1].exists()
    with monkeypatch.context() as patch:
        patch.setattr(transforming, "optimize_locally", None)  # its maps come from the work folder
        made = compile_toy(SMALL, TRAINED, files[1], work_dir=works[1])
    assert len(made.report.curves["end to end"]) == STEPS.steps
    assert same_values(last_values(works[1]), last_values(works[0]))
    assert files[1].read_bytes() == files[0].read_bytes()
