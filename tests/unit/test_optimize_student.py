"""The student: the program's values and gradients, whatever is kept or computed again."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph import blocks, evaluate
from fptq_compiler.graph.blocks import outline
from fptq_compiler.optimize import block_function
from fptq_compiler.optimize import student as student_module
from fptq_compiler.optimize.block_function import block_functions
from fptq_compiler.optimize.divergence import jensen_shannon
from fptq_compiler.optimize.student import Student
from fptq_compiler.optimize.token_parts import Logits
from fptq_compiler.transforms.dense import shared_evaluation
from tests.quantized_toy import Quantized, groups_of, parameters_of, quantized


@pytest.fixture
def toy() -> Iterator[Quantized]:
    with quantized() as made:
        yield made


@pytest.fixture
def ids(toy: Quantized) -> Tensor:
    return toy.rows[:2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_are_the_programs(toy: Quantized, ids: Tensor, checkpointing: bool) -> None:
    with groups_of(toy) as groups:
        expected = toy.program.run(ids)
        student = Student(toy.program, parameters_of(groups), checkpointing=checkpointing)
        with shared_evaluation(student.module):
            found = student(ids)
    assert found.requires_grad
    assert torch.equal(found, expected)


def test_checkpointing_changes_no_gradient(toy: Quantized, ids: Tensor) -> None:
    gradients = []
    with groups_of(toy) as groups:
        for checkpointing in (False, True):
            parameters = parameters_of(groups)
            student = Student(toy.program, parameters, checkpointing=checkpointing)
            with shared_evaluation(student.module):
                loss = student(ids).square().mean()
                gradients.append(torch.autograd.grad(loss, parameters))
    assert sum(bool(plain.any()) for plain in gradients[0]) > 30
    for plain, again in zip(*gradients, strict=True):
        # float32 sums of the same terms in another order
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_what_nothing_trained_reaches_is_computed_once(
    toy: Quantized, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Counter[str] = Counter()
    original = block_function.run_node

    def run_node(module: object, node: Node, *rest: object) -> object:
        runs[node.name] += 1
        return original(module, node, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(block_function, "run_node", run_node)
    teacher = Student(toy.transformed)
    weights = {n.name for n in toy.transformed.graph.nodes if n.op == "call_module"}
    assert weights
    assert {runs[name] for name in weights} == {1}
    teacher(ids)
    teacher(ids)
    assert {runs[name] for name in weights} == {1}
    runs.clear()
    with groups_of(toy) as groups:
        student = Student(toy.program, parameters_of(groups))
        student(ids)
        student(ids)
    (embedding,) = [q.module for q in toy.program.weight_quantizers if q.role == "embedding"]
    (linear, *_) = [q.module for q in toy.program.weight_quantizers if q.role == "linear"]
    names = {n.target: n.name for n in toy.program.graph.nodes if n.op == "call_module"}
    assert runs[names[embedding]] == 1
    assert runs[names[linear]] == 2


def test_a_trained_value_is_read_again(toy: Quantized, ids: Tensor) -> None:
    with groups_of(toy) as groups:
        parameters = parameters_of(groups)
        student = Student(toy.program, parameters)
        before = student(ids)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05)
        assert not torch.equal(student(ids), before)
        assert torch.equal(student(ids), toy.program.run(ids))


def test_a_quantisers_value_does_not_depend_on_the_compute_type(
    toy: Quantized, ids: Tensor
) -> None:
    """Quantisers stay in float32: what enters the first linear is the same to the bit."""
    first = toy.program.activation_quantizers[0]
    found: list[Tensor] = []

    def watch(node: Node, value: object) -> None:
        if node.target == first.module:
            assert isinstance(value, Tensor)
            found.append(value)

    for compute in (torch.float32, torch.bfloat16):
        Student(toy.program, [*toy.program.module.parameters()], compute=compute)(ids, watch)
    assert torch.equal(*found)


def test_hidden_is_what_the_head_reads(toy: Quantized, ids: Tensor) -> None:
    head = outline(toy.program)[-1]
    inside = set(head.nodes)
    values: dict[Node, Tensor] = {}
    with torch.no_grad():
        evaluate.run(toy.program.module, toy.program.arguments(ids), watch=values.__setitem__)
        found = Student(toy.program).hidden(ids)
    entering = {x for n in head.nodes for x in n.all_input_nodes if x not in inside}
    expected = [values[x] for x in entering if x in values and values[x].shape == found.shape]
    assert len(expected) == 1
    assert torch.equal(found, expected[0])


def test_a_graph_without_blocks_has_no_hidden_state(
    toy: Quantized, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [n for block in outline(toy.program) for n in block.nodes]
    block = type(outline(toy.program)[0])("model", tuple(whole))
    monkeypatch.setattr(blocks, "outline", lambda program: [block])
    student = Student(toy.program)
    assert torch.equal(student(ids), toy.program.run(ids))
    with pytest.raises(OptimizationError, match="cannot be cut into blocks"):
        student.hidden(ids)


def test_logits_in_parts_have_the_gradients_of_the_whole(toy: Quantized, ids: Tensor) -> None:
    """Also those of the head's own quantiser, in front of the last linear."""
    with groups_of(toy) as groups:
        parameters = parameters_of(groups)
        student, expected = Student(toy.program, parameters), toy.original.run(ids)
        parts = student.logits(ids)
        assert parts.tokens.shape[-1] != expected.shape[-1]
        losses = [jensen_shannon(x, expected) for x in (parts, Logits(student(ids)))]
        found, whole = (torch.autograd.grad(loss, parameters) for loss in losses)
    assert sum(bool(x.any()) for x in whole) > 30
    for part, exact in zip(found, whole, strict=True):
        # float32 sums of the same terms in another order
        torch.testing.assert_close(part, exact, rtol=1e-4, atol=1e-6)


def test_a_trained_map_of_the_head_learns_through_logits_in_parts(ids: Tensor) -> None:
    """T_r stands on the last weight too, which is then what all tokens read."""
    with quantized(residual=True) as toy, groups_of(toy) as groups:
        parameters = parameters_of(groups)
        student, expected = Student(toy.program, parameters), toy.original.run(ids)
        with shared_evaluation(student.module):
            parts = student.logits(ids)
            assert [x.requires_grad for x in parts.shared] == [True]
            found = torch.autograd.grad(jensen_shannon(parts, expected), parameters)
        with shared_evaluation(student.module):
            whole = torch.autograd.grad(jensen_shannon(student(ids), expected), parameters)
    for part, exact in zip(found, whole, strict=True):
        torch.testing.assert_close(part, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hold", [False, True])
def test_parameters_are_held_in_what_reads_them(
    toy: Quantized, hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of linears in their compute type, once; a table as it is."""
    monkeypatch.setattr(student_module, "worth_holding", lambda module: hold)
    read: Counter[str] = Counter()

    def attribute(module: nn.Module, target: str) -> object:
        read[target] += 1
        return evaluate.held(module, target)

    monkeypatch.setattr(evaluate, "attribute", attribute)
    teacher = Student(toy.original, compute=torch.bfloat16)
    read.clear()
    teacher(toy.rows[:2])
    weights = {name for name in read if name.endswith("proj.weight") or "lm_head" in name}
    assert bool(weights) is not hold
    constants = {n.name: v for b in teacher._blocks for n, v in b._constants.items()}
    types = {name: value.dtype for name, value in constants.items() if "proj" in name}
    assert set(types.values()) == ({torch.bfloat16} if hold else set())


def test_a_block_reads_its_own_parameters_alone(toy: Quantized) -> None:
    with groups_of(toy) as groups:
        named = {id(p): n for group in groups for n, p in group.parameters.items()}
        read = {
            block.name: {named[id(p)] for p in block.parameters if id(p) in named}
            for block in block_functions(toy.program, parameters_of(groups))
        }
    assert list(read) == ["embedding", "blocks.0", "blocks.1", "head"]
    assert not read["embedding"]
    for index in range(2):
        maps = {name for name in read[f"blocks.{index}"] if name.partition(".")[0] == "updown"}
        assert maps == {f"updown.model.layers.{index}.mlp/log_scale"}
    assert not read["blocks.0"] & read["blocks.1"]
