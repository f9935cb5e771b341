"""Block-wise training: every block's error falls, and only one block is at work."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fptq_compiler.errors import OptimizationError
from fptq_compiler.optimize import blockwise
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.block_function import BlockFunction, block_functions
from fptq_compiler.optimize.blockwise import train_blocks
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.trainable import Group
from fptq_compiler.optimize.training import Plan
from fptq_compiler.optimize.training_state import TrainingState
from fptq_compiler.progress import SilentProgress
from fptq_compiler.work import TrainingFile
from tests.quantized_toy import Quantized, groups_of, quantized

BLOCKS = ["blocks.0", "blocks.1"]


@pytest.fixture
def toy() -> Iterator[Quantized]:
    with quantized() as made:
        yield made


def trained(
    toy: Quantized, groups: list[Group], *, inputs: str = "quantised", steps: int = 8,
    progress: SilentProgress | None = None,
) -> dict[str, TrainingState]:
    return train_blocks(
        toy.program, toy.transformed, groups,
        Batches.split(toy.rows, held_out=2, size=2, seed=0), Plan(steps, 0.1, 1.0, 4, 0),
        inputs=inputs, compute=torch.float32, keeper=TrainingFile(None),
        progress=progress or SilentProgress(),
    )


@pytest.mark.parametrize("inputs", ["quantised", "original"])
def test_every_blocks_error_falls(toy: Quantized, inputs: str) -> None:
    ids = toy.rows[-2:]
    exact = Student(toy.transformed).hidden(ids)

    @torch.no_grad()
    def error() -> float:
        return float((Student(toy.program).hidden(ids) - exact).square().mean())

    before = error()
    with groups_of(toy) as groups:
        states = trained(toy, groups, inputs=inputs)
    assert list(states) == BLOCKS
    for state in states.values():
        assert len(state.losses) == 8
        assert min(state.held_out.values()) < state.held_out[0]
    if inputs == "quantised":
        assert error() < before


def test_the_first_error_is_that_of_the_rounded_block_alone(toy: Quantized) -> None:
    """Of the second block on original inputs, by hand from the two programs."""
    held_out = toy.rows[-1:]

    def through(program: object, replaced: dict[str, object] | None) -> dict[str, object]:
        """By name what enters the second block, and leaves it, as `out …`."""
        from fptq_compiler.graph.evaluate import bind_inputs
        from fptq_compiler.graph.program import Program

        assert isinstance(program, Program)
        values = bind_inputs(program.module, program.arguments(held_out), None)
        found: dict[str, object] = {}
        for block in block_functions(program):
            if block.name == "blocks.1":
                found = {node.name: value for node, value in values.items()}
                for node in values:
                    values[node] = (replaced or {}).get(node.name, values[node])
                values = block(values)
                return {**found, **{f"out {n.name}": value for n, value in values.items()}}
            values = block(values)
        raise AssertionError

    exact = through(toy.transformed, None)
    rounded = through(toy.program, exact)
    (name,) = [
        n for n, v in exact.items()
        if n.startswith("out ") and isinstance(v, Tensor) and v.shape[-1:] == (24,)
    ]
    y, found = exact[name], rounded[name]
    assert isinstance(y, Tensor)
    assert isinstance(found, Tensor)
    expected = ((found - y).square().mean(-1) / y.square().mean(-1)).mean()
    with groups_of(toy, transforms_rate=1e-12, matrices_rate=0.0, weights_rate=0.0,
                   activations_rate=0.0, zero_points_rate=0.0) as groups:
        states = train_blocks(
            toy.program, toy.transformed, groups,
            Batches(toy.rows[:4], held_out, 2, 0), Plan(1, 0.0, 1.0, 4, 0),
            inputs="original", compute=torch.float32, keeper=TrainingFile(None),
            progress=SilentProgress(),
        )
    assert states["blocks.1"].held_out[0] == pytest.approx(float(expected), rel=1e-4)


def test_nothing_of_other_blocks_moves(
    toy: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[set[str]] = []
    with groups_of(toy) as groups:
        named = {n: p for group in groups for n, p in group.parameters.items()}
        layers = {
            block.name: {n for n, p in named.items() if any(p is x for x in block.parameters)}
            for block in block_functions(toy.program, [*named.values()])
        }
        original = blockwise.train

        def observed(*arguments: object, **options: object) -> TrainingState:
            before = {n: p.detach().clone() for n, p in named.items()}
            state: TrainingState = original(*arguments, **options)  # type: ignore[arg-type]
            moved.append({n for n, p in named.items() if not torch.equal(p, before[n])})
            return state

        monkeypatch.setattr(blockwise, "train", observed)
        trained(toy, groups)
    for name, found in zip(BLOCKS, moved, strict=True):
        assert found <= layers[name]
        assert any(n.startswith("updown") for n in found)
        assert len(found) > 0.8 * len([n for n in layers[name] if "zero_point" not in n])


def test_only_one_block_is_alive(toy: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of earlier blocks neither the function, with its merged weights, nor a value is left."""
    functions: list[weakref.ref[BlockFunction]] = []
    values: list[tuple[str, weakref.ref[Tensor]]] = []
    alive: list[set[str]] = []
    original = BlockFunction.__call__

    def call(self: BlockFunction, entering: object, watch: object = None) -> object:
        if not functions or functions[-1]() is not self:
            gc.collect()
            alive.append({name for name, ref in values if ref() is not None})
            functions.append(weakref.ref(self))

        def keep(node: object, value: object) -> None:
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == 40:
                values.append((self.name, weakref.ref(value)))

        return original(self, entering, keep)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockFunction, "__call__", call)
    with groups_of(toy) as groups:
        trained(toy, groups, steps=2)
    assert {name for name, _ in values} == set(BLOCKS)
    assert all(not left for left in alive)
    gc.collect()
    assert all(ref() is None for ref in functions)


def test_the_bar_says_which_block_and_how_well(toy: Quantized) -> None:
    class Bar(SilentProgress):
        notes: list[str] = []  # noqa: RUF012
        labels: list[str] = []  # noqa: RUF012

        def start(self, label: str, total: int | None = None) -> None:
            self.labels.append(f"{label} {total}")

        def advance(self, n: int = 1, note: str = "") -> None:
            if note.startswith("blocks"):
                self.notes.append(note.partition(":")[0])

    bar = Bar()
    with groups_of(toy) as groups:
        trained(toy, groups, steps=1, progress=bar)
    assert bar.labels == ["block-wise training 3", "blocks.0 1", "blocks.1 1"]
    assert bar.notes == BLOCKS


def test_a_graph_without_blocks_is_refused(
    toy: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fptq_compiler.graph.blocks import Block
    from fptq_compiler.optimize import block_function

    whole = block_function.outline

    def uncut(program: object) -> list[Block]:
        nodes = [n for block in whole(program) for n in block.nodes]  # type: ignore[arg-type]
        return [Block("model", tuple(nodes))]

    monkeypatch.setattr(block_function, "outline", uncut)
    with groups_of(toy) as groups, pytest.raises(OptimizationError, match="anything to train"):
        trained(toy, groups)
