"""Give attention masks and positions their plain values, so that token ids are the only input.

    before  logits = f(input_ids, attention_mask, position_ids)
    after   logits = f(input_ids)      a mask of ones, positions 0 1 2 ...

`--kv-cache` counts positions and hides padding by an attention mask of its own.
"""

from __future__ import annotations

import copy

import torch
from torch.fx import Node

from fptq_compiler.graph.evaluate import longest_sequence
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import InputSpec, Program
from fptq_compiler.graph.resize import free_sizes
from fptq_compiler.graph.surgery import call, clean
from fptq_compiler.passes.canonicalize import inline_wrappers
from fptq_compiler.passes.plain_inputs import is_mask, is_positions
from fptq_compiler.passes.whole_proof import WholeProof

aten = torch.ops.aten


class DropInputs(Pass):
    """Drop all masks and positions of a program that has nothing else beside token ids."""

    def run(self, program: Program) -> PassResult:
        """Rewrite once; a program with other inputs is left as it is."""
        ids = program.node(program.inputs[program.ids_index].name)
        others = [n for n in program.graph.nodes if n.op == "placeholder" and n is not ids]
        if not others or not all(is_mask(n) or is_positions(n) for n in others):
            return PassResult(0)
        proof = WholeProof.of(program)
        drop_inputs(program, others, ids)
        make_plain(program, ids, longest_sequence(program.module))
        proof.check(program)
        names = ", ".join(n.name for n in others)
        program.decisions.append(
            f"inputs {names} left out: every token is shown, positions count from 0"
        )
        return PassResult(len(others))


def drop_inputs(program: Program, inputs: list[Node], ids: Node) -> None:
    """Readers of masks and positions read their plain values; the inputs stay, unread."""
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    batch, sequence = (
        call(program.graph, first, aten.sym_size.int, (ids, axis), like=None) for axis in (0, 1)
    )
    for node in inputs:
        dtype = node.meta["val"].dtype
        with program.graph.inserting_before(first):
            if is_mask(node):
                plain = program.graph.call_function(
                    aten.full.default, ([batch, sequence], 1), {"dtype": dtype}
                )
            else:
                plain = program.graph.call_function(
                    aten.arange.default, (sequence,), {"dtype": dtype}
                )
                if node.meta["val"].dim() == 2:
                    plain = program.graph.call_function(aten.unsqueeze.default, (plain, 0))
                    if node.meta["val"].shape[0] != 1:
                        plain = program.graph.call_function(
                            aten.expand.default, (plain, [batch, sequence])
                        )
        node.replace_all_uses_with(plain)


def make_plain(program: Program, ids: Node, longest: int | None) -> None:
    """From token ids of any size to logits: nothing else comes in or goes out."""
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    found = output.args[0]
    output.args = ((found[0] if isinstance(found, (tuple, list)) else found,),)
    inline_wrappers(program)
    clean(program.module)
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and node is not ids:
            program.graph.erase_node(node)
    free_sizes(program.module, ids, longest)
    program.module.graph = copy.deepcopy(program.graph)  # the names of what is gone are free again
    dtype = ids.meta["val"].dtype
    program.inputs = (InputSpec(ids.name, dtype, ("batch", "sequence")),)
    program.outputs = ("logits",)

