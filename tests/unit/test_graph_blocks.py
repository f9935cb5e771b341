"""Blocks: views of the flat graph, run one after another with little kept between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from fptq_compiler.graph.blocks import (
    BlockRunner,
    logits_node,
    outline,
    outline_with_logits,
)
from fptq_compiler.graph.evaluate import Environment, run_node
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.passes import FIND_SITES, insertion
from tests.toys import ToyConfig, export_toy, make_tokens

CONFIG = ToyConfig(layers=3)
aten = torch.ops.aten
exported = pytest.fixture(scope="module")(lambda: export_toy(CONFIG))


@pytest.fixture(params=["plain", "scaled"])
def program(request: pytest.FixtureRequest, exported: Any) -> Program:
    """The sites found; then also under S_n, which renames the stream."""
    found = unlift(exported)
    run_passes(found, FIND_SITES)
    if request.param == "scaled":
        run_passes(found, insertion(["scaling"], seed=0, scaling_places=("down_proj",)))
    return found


def _nodes(program: Program) -> list[Node]:
    return [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]


def test_outline_cuts_the_graph_into_its_blocks(program: Program) -> None:
    blocks = outline(program)
    assert [b.name for b in blocks] == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert [n for b in blocks for n in b.nodes] == _nodes(program)
    weights = [
        {str(a.target) for n in b.nodes for a in n.all_input_nodes if a.op == "get_attr"}
        for b in blocks
    ]
    for index in range(CONFIG.layers):
        assert f"model.layers.{index}.self_attn.q_proj.weight" in weights[index + 1]
        assert f"model.layers.{index}.mlp.down_proj.weight" in weights[index + 1]
    assert "lm_head.weight" in weights[-1]


@pytest.mark.parametrize("capped", [False, True])
def test_the_logits_are_a_block_of_their_own(program: Program, capped: bool) -> None:
    """The last linear and what follows value by value, such as a soft cap."""
    if capped:
        _behind_logits(program, aten.div.Tensor, 30.0)
        _behind_logits(program, aten.tanh.default)
        _behind_logits(program, aten.mul.Tensor, 30.0)
    *front, head, logits = outline_with_logits(program)
    assert [b.name for b in front] == ["embedding", "blocks.0", "blocks.1", "blocks.2"]
    assert (head.name, logits.name) == ("head", "logits")
    assert [n.target for n in logits.nodes] == [aten.linear.default] + capped * [
        aten.div.Tensor, aten.tanh.default, aten.mul.Tensor
    ]
    assert [*head.nodes, *logits.nodes] == [*outline(program)[-1].nodes]


def test_logits_that_depend_on_each_other_stay_in_the_head(program: Program) -> None:
    _behind_logits(program, aten.softmax.int, -1)
    *_, head, logits = outline_with_logits(program)
    assert logits.nodes == ()
    assert head == outline(program)[-1]


def test_a_linear_that_something_else_reads_stays_in_the_head(program: Program) -> None:
    linear = logits_node(program)
    _behind_logits(program, aten.amax.default, [-1], True)
    _behind_logits(program, aten.mul.Tensor, linear)
    assert outline_with_logits(program)[-1].nodes == ()


def _behind_logits(program: Program, target: Any, *rest: Any) -> None:
    logits = logits_node(program)
    (output,) = logits.users
    capped = call(program.graph, output, target, (logits, *rest), like=logits)
    output.replace_input_with(logits, capped)


def test_without_known_attention_the_model_is_one_block(exported: Any) -> None:
    program = unlift(exported)
    (block,) = outline(program)
    assert block.name == "model"
    assert list(block.nodes) == _nodes(program)


def test_block_by_block_equals_the_whole_run(program: Program) -> None:
    batches = [make_tokens(CONFIG, 2, 9), make_tokens(CONFIG, 1, 4)]
    runner = BlockRunner(program, batches)
    for block in runner.blocks:
        runner.run_block(block)
    result = logits_node(program)
    for ids, environment in zip(batches, runner._environments, strict=True):
        # No tolerance: the same operators in the same order.
        assert environment[result].equal(program.run(ids))
        assert set(environment) == {result}  # nothing else is kept to the end


def test_environments_keep_what_later_blocks_read(program: Program) -> None:
    runner = BlockRunner(program, [make_tokens(CONFIG, 2, 9)])
    done: set[Node] = {n for n in program.graph.nodes if n.op == "placeholder"}
    for block in runner.blocks:
        runner.run_block(block)
        done |= set(block.nodes)
        needed = {n for n in done if any(user not in done for user in n.users)}
        (environment,) = runner._environments
        assert set(environment) == needed, block.name


def test_a_step_of_its_own_sees_and_replaces_every_value(program: Program) -> None:
    runner = BlockRunner(program, [make_tokens(CONFIG, 2, 9)])
    seen: list[Node] = []

    def step(node: Node, environment: Environment) -> Any:
        seen.append(node)
        value = run_node(program.module, node, environment, None)
        return value * 0 if node.name == "embedding" else value

    for block in runner.blocks:
        runner.run_block(block, step)
    assert seen == _nodes(program)
    (environment,) = runner._environments
    (logits,) = environment.values()
    assert logits.abs().max() == 0  # a decoder without biases maps 0 to 0
