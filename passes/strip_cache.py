"""Take out the KV cache that a model was captured with: whole sequences in, logits out.

    before  logits, present = f(input_ids, attention_mask, past)      a growing cache
            logits = f(input_ids, cache_position), buffers written    a static one
    after   logits = f(input_ids)

The past is empty: `cat([past, k])` is k, and so is what a static cache holds at the positions
from 0 on. Masks and positions take their plain values, sizes that the cache had fixed become
free, and what the cache added to positions goes. What was a mask over all static positions is
cut to the keys that there are; the rest is for the passes that every model goes through.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.evaluate import Region, ancestors, longest_sequence
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import call, clean, replace
from fptq_compiler.passes.captured_cache import (
    COPY_BACK,
    Slot,
    behind_pass,
    find_slots,
    is_size,
    outputs_of,
    parts_of,
    refuse,
)
from fptq_compiler.passes.drop_inputs import drop_inputs, make_plain
from fptq_compiler.passes.plain_inputs import is_mask, is_positions
from fptq_compiler.passes.whole_proof import WholeProof

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add.Scalar)


class StripCache(Pass):
    """Strip once; a program without a cache and with logits alone is left as it is."""

    def run(self, program: Program) -> PassResult:
        """Find the cache, take it out, free the sizes, and prove all of it by running.

        Raises:
            UnsupportedModelError: a cache that cannot be taken out, naming the node.
            VerificationError: the stripped graph computes something else.
        """
        presents = outputs_of(program)[1:]
        if not presents and not program.call_nodes(COPY_BACK):
            return PassResult(0)
        slots = find_slots(program)
        if not presents and not slots:
            return PassResult(0)
        ids = program.node(program.inputs[program.ids_index].name)
        _refuse_fixed(ids)
        for slot in slots:
            _refuse_other_presents(slot, presents)
        lengths = [s.length for s in slots if s.length]
        bounds = [x for x in (longest_sequence(program.module), *lengths) if x]
        longest = min(bounds, default=None)
        proof = WholeProof.of(program, slots, longest)
        for slot in slots:
            _take_out(program, slot, ids)
        _drop_writes(program)
        _drop_empty_parts(program)
        drop_inputs(program, _other_inputs(program, ids), ids)
        make_plain(program, ids, longest)
        _drop_zero_offsets(program)
        clean(program.module)
        proof.check(program)
        program.decisions.append(_words(slots, presents))
        return PassResult(max(len(slots), 1))


def _other_inputs(program: Program, ids: Node) -> list[Node]:
    """Masks and positions that are still read, now that the cache is out."""
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    output.args = (outputs_of(program)[:1],)
    program.graph.eliminate_dead_code()
    found = [n for n in program.graph.nodes if n.op == "placeholder" and n.users and n is not ids]
    for node in found:
        if not is_mask(node) and not is_positions(node):
            refuse(node, "is neither token ids nor a cache, a mask (B, T) or positions")
    return found


def _refuse_fixed(ids: Node) -> None:
    """A graph for one number of tokens cannot be made one for any number."""
    size = ids.meta["val"].shape[1] if ids.meta["val"].dim() > 1 else None
    if isinstance(size, torch.SymInt):
        return
    message = (
        f"the model was captured with a KV cache for exactly {size} token(s) a run: the sequence "
        f"of {ids.name} is fixed, expected a free one. Export it without a cache "
        "(use_cache=False), or with a dynamic sequence: at least two example tokens, and "
        f"dynamic_shapes={{'{ids.name}': {{1: Dim.DYNAMIC}}, ...}} where every other input of "
        "that length is dynamic too"
    )
    raise UnsupportedModelError(message)


def _refuse_other_presents(slot: Slot, presents: list[Node]) -> None:
    """A growing cache must come out as it went on, or it keeps something else."""
    if slot.length is not None:
        return
    if not isinstance(slot.past.meta["val"].shape[slot.axis], torch.SymInt):
        size = slot.past.meta["val"].shape[slot.axis]
        refuse(slot.past, f"holds exactly {size} tokens, expected dimension {slot.axis} dynamic")
    if slot.joined not in [behind_pass(x) for x in presents]:
        kept = [x for x in presents if slot.joined in ancestors(x)]
        names = ", ".join(x.name for x in kept) or "nothing"
        refuse(
            slot.joined,
            f"joins past and new tokens, but what comes out is {names}: a sliding window, or "
            "another layout",
        )


def _take_out(program: Program, slot: Slot, ids: Node) -> None:
    """Attention reads the new tokens alone; the past has none."""
    slot.joined.replace_all_uses_with(slot.new)
    for node in program.graph.nodes:
        if is_size(node) and behind_pass(node.args[0]) is slot.past:
            _set_size(program, slot, node, ids)
        elif node.target is aten.arange.default and slot.length and node.args == (slot.length,):
            node.args = (call(program.graph, node, aten.sym_size.int, (ids, 1), like=None),)


def _set_size(program: Program, slot: Slot, node: Node, ids: Node) -> None:
    axis = node.args[1]
    assert isinstance(axis, int)
    if axis % slot.past.meta["val"].dim() == slot.axis:
        for reader in list(node.users):
            reader.args = torch.fx.map_arg(reader.args, lambda n: 0 if n is node else n)
    else:  # what else is free is the batch
        node.replace_all_uses_with(
            call(program.graph, node, aten.sym_size.int, (ids, 0), like=node)
        )


def _drop_writes(program: Program) -> None:
    """What a run leaves in buffers is for the next one, and there is none."""
    for node in program.call_nodes(COPY_BACK):
        program.graph.erase_node(node)


def _drop_empty_parts(program: Program) -> None:
    """A cache may begin with a literal tensor of no elements, as that of transformers does."""
    for node in program.call_nodes(aten.cat.default):
        parts = parts_of(node)
        if len(parts) == 1:
            replace(node, parts[0])


def _drop_zero_offsets(program: Program) -> None:
    """Positions to which a cache of no tokens adds its length are the positions."""
    regions = [Region(program.module, 1, 5), Region(program.module, 3, 8)]
    for node in list(program.graph.nodes):
        if node.target not in ADDITIONS or node.meta["val"].is_floating_point():
            continue
        source, offset = node.args[:2]
        if isinstance(offset, Node):
            value = offset.meta["val"]
            by_size = isinstance(value, Tensor) and value.dim() == 0 and _depends_on_sizes(offset)
            zero = by_size and all(int(r.value(offset, {})) == 0 for r in regions)
        else:
            zero = offset == 0
        if zero and isinstance(source, Node):
            replace(node, source)


def _depends_on_sizes(node: Node) -> bool:
    behind = ancestors(node)
    return all(
        is_size(reader)
        for x in behind if x.op == "placeholder"
        for reader in x.users if reader in behind
    )


def _words(slots: list[Slot], presents: list[Node]) -> str:
    if not slots:
        return f"{len(presents)} outputs beside the logits left out"
    kind = "static" if slots[0].length else "growing"
    return (
        f"captured with a {kind} KV cache of {len(slots)} tensors, which was taken out: the model "
        "reads whole sequences, and --kv-cache gives it a cache of ours"
    )
