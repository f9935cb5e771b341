"""Bring an exported graph to one plain spelling: no wrappers, no casts to the same type.

What goes: grad-mode and autocast wrappers (inlined), metadata assertions, dropout in
evaluation, copies, slices and expansions that change no shape, the statistics of a LayerNorm, and
what is written to buffers that the output does not depend on (a step counter). torch.export
leaves all of these between the operators that patterns look for; torch.onnx drops them too, but
later than we match.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.evaluate import ancestors, attribute
from fptq_compiler.graph.foreign import WRAPPERS
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program, source_line
from fptq_compiler.graph.shaped import same_shape
from fptq_compiler.graph.surgery import call, replace

aten = torch.ops.aten
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.to.other,
)
COPIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
BATCH_NORMS = (
    aten.batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
)
"""With the flag of training as their sixth argument."""


class Canonicalize(Pass):
    """Inline wrappers and drop operators that change nothing."""

    provides = ("canonical",)

    def run(self, program: Program) -> PassResult:
        """Rewrite the whole graph; see the module docstring."""
        changed = inline_wrappers(program)
        copied = any(node.target in COPIES for node in program.graph.nodes)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and _drop(node):
                changed += 1
        if copied:
            _free_views(program)
        _refuse_training(program)
        changed += _drop_unread_writes(program)
        _refuse_mutation(program)
        return PassResult(changed)


def inline_wrappers(program: Program) -> int:
    """Put what grad-mode and autocast wrappers hold in their place; gives how many there were."""
    wrappers = [
        n for n in program.graph.nodes if n.op == "call_function" and str(n.target) in WRAPPERS
    ]
    for node in wrappers:
        _inline(program.module, node)
    return len(wrappers)


def _inline(module: GraphModule, node: Node) -> None:
    """Copy the wrapped submodule's nodes in place of the wrapper."""
    position = next(
        i for i, a in enumerate(node.args) if isinstance(a, Node) and _is_graph(module, a)
    )
    inner_node = input_node(node, position)
    inner = attribute(module, str(inner_node.target))
    operands = list(node.args[position + 1 :])
    values: dict[Node, Any] = {}
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    values.update(zip(placeholders, operands, strict=True))
    results: Any = None
    with node.graph.inserting_before(node):
        for inner_step in inner.graph.nodes:
            if inner_step.op == "placeholder":
                continue
            if inner_step.op == "output":
                results = torch.fx.map_arg(inner_step.args[0], values.__getitem__)
                continue
            values[inner_step] = node.graph.node_copy(inner_step, values.__getitem__)
    for reader in list(node.users):
        index = reader.args[1]
        assert isinstance(index, int)
        reader.replace_all_uses_with(results[index])
        node.graph.erase_node(reader)
    node.graph.erase_node(node)


def _is_graph(module: GraphModule, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(
        attribute(module, str(node.target)), GraphModule
    )


def _drop(node: Node) -> bool:
    """Erase `node` where it changes nothing; True where it was erased."""
    if node.target is aten._assert_tensor_metadata.default or node.target in (
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
    ):
        node.graph.erase_node(node)
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    if _is_normalized(node, source):
        norm = call(
            node.graph, node, aten.layer_norm.default, source.args, like=node
        )
        replace(node, norm)
        return True
    if node.target is aten._unsafe_view.default:
        node.target = aten.reshape.default  # the copy in front, whose strides it took, goes
        return False
    if node.target is aten.chunk.default:
        return _spell_sizes(node, source)
    dead = bool(
        node.target in COPIES
        or (node.target is aten.dropout.default and not node.args[2])
        or (node.target in CASTS and _same_type(source, node))
        or (node.target is aten.slice.Tensor and _takes_all(node))
        or (node.target is aten.expand.default and same_shape(source, node))
    )
    if dead:
        replace(node, source)
    return dead


def _spell_sizes(chunk: Node, source: Node) -> bool:
    """A number of chunks of known size is a split: ONNX has one operator for that."""
    count, axis = chunk.args[1], chunk.args[2] if len(chunk.args) > 2 else 0
    size = source.meta["val"].shape[axis]
    if not isinstance(size, int) or not isinstance(count, int) or size % count:
        return False
    arguments = (source, [size // count] * count, axis)
    split = aten.split_with_sizes.default
    replace(chunk, call(chunk.graph, chunk, split, arguments, like=chunk))
    return True


def _free_views(program: Program) -> None:
    """Views of what is no longer copied may have to copy: they become reshapes."""
    for node in program.call_nodes(aten.view.default):
        node.target = aten.reshape.default


def _is_normalized(node: Node, source: Node) -> bool:
    """The first result of a LayerNorm that gives its statistics too."""
    return bool(
        source.target is aten.native_layer_norm.default
        and node.target is operator.getitem
        and node.args[1] == 0
    )


def _same_type(source: Node, node: Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    return before is not None and after is not None and bool(before.dtype == after.dtype)


def _takes_all(node: Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else None
    stop = node.args[3] if len(node.args) > 3 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and stop in (None, 2**63 - 1) and step == 1)


def _drop_unread_writes(program: Program) -> int:
    """Forget what is kept for the next run in buffers that no output is computed from."""
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    read = {str(n.target) for n in ancestors(output) if n.op == "get_attr"}
    dropped = 0
    for node in list(program.graph.nodes):
        if node.target is aten.copy_.default and not node.users:
            buffer = input_node(node)
            if buffer.op == "get_attr" and str(buffer.target) not in read:
                node.graph.erase_node(node)
                dropped += 1
    return dropped


def _refuse_mutation(program: Program) -> None:
    """In-place operators would make every later rewrite unsafe."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            written = node.args[0] if node.args else None
            what = "a tensor"
            if isinstance(written, Node) and written.op == "get_attr":
                what = f"buffer {written.target}"
            where = next((x for x in map(source_line, (node, *node.all_input_nodes)) if x), "")
            message = (
                f"node {node.name} ({node.target}) changes {what} in place, expected a model "
                f"that keeps nothing from one run to the next. {where}\n"
                "Call model.eval() before torch.export.export, and write what must be kept "
                "outside forward."
            )
            raise UnsupportedModelError(message)


def _refuse_training(program: Program) -> None:
    """A model that was exported in training mode is not the one that will be used."""
    for node in program.graph.nodes:
        what = _trains(node)
        if what:
            message = (
                f"node {node.name} ({node.target}) {what}: the model was exported in training "
                f"mode, expected evaluation. {source_line(node)}\n"
                "Call model.eval() before torch.export.export."
            )
            raise UnsupportedModelError(message)


def _trains(node: Node) -> str:
    """What an operator does in training only, in words; empty where it does nothing such."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    if node.target in BATCH_NORMS:
        return "normalises by the statistics of the batch" if node.args[5] else ""
    if node.target is aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return "draws random numbers" if dropout != 0.0 else ""
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return "draws random numbers" if random else ""
