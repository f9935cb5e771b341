"""Give an exported model another float type.

All float32 becomes the new type, with two exceptions. What follows from a sum of squares stays
until it meets a value of the new type: such sums, and the factors made of them, leave the range
of float16. And what a sine or cosine is taken of stays: an angle of 1,000 would be off by a half.
What the carried operators keep in float32 inside stands in their expansions, and the scales of a
cache stay for them.

Logits in float16 are left to the reader, who can turn them; in bfloat16 they are cast to float32,
for NumPy has no bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fptq_compiler.errors import LoweringError

FLOAT = ir.DataType.FLOAT
SUM = "SumOfSquares"
CACHED, SCALES = "CachedAttention", 9  # the operator, and which of its inputs are scales
WAVES = ("Sin", "Cos")
LARGEST = {
    ir.DataType.FLOAT16: torch.finfo(torch.float16).max,
    ir.DataType.BFLOAT16: torch.finfo(torch.bfloat16).max,
}


def convert(model: ir.Model, to: ir.DataType) -> None:
    """Turn float32 into `to`, in place; carried operators are not expanded yet.

    Raises:
        LoweringError: a parameter has a value that the type cannot hold.
    """
    graph = model.graph
    wide = _wide_nodes(graph)
    constants = [v for v in graph.initializers.values() if _is_float(v) and not _is_scale(v)]
    for value in constants:
        if _read_by(value, wide):
            _narrow_behind(graph, value, wide, to)
        else:
            _retype_initializer(value, to)
    for value in graph.inputs:
        if _is_float(value):
            value.type = ir.TensorType(to)
    for node in list(graph):
        if node.op_type == "Constant" and not _read_by(node.outputs[0], wide):
            _retype_constant(node, to)
        elif node.op_type == "Constant" or node in wide:
            _narrow_behind(graph, node.outputs[0], wide, to)
        else:
            _retype_node(node, to)
    if to == ir.DataType.BFLOAT16:
        _widen_output(graph, 0)


def _widen_output(graph: ir.Graph, index: int) -> None:
    value = graph.outputs[index]
    cast = ir.node("Cast", [value], {"to": FLOAT.value})
    (wide,) = cast.outputs
    wide.name, value.name = value.name, f"{value.name}_narrow"
    wide.shape, wide.type = value.shape, ir.TensorType(FLOAT)
    graph.append(cast)
    graph.outputs[index] = wide


def _wide_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that give float32."""
    found: set[ir.Node] = set()
    for node in graph:  # forwards from the sums of squares
        sources = _float_sources(node)
        if node.op_type == SUM or (sources and all(s in found for s in sources)):
            found.add(node)
    angles = [node for node in graph if node.op_type in WAVES]
    while angles:  # backwards from the waves
        node = angles.pop()
        if node not in found:
            found.add(node)
            angles += [source for source in _float_sources(node) if source is not None]
    return found


def _float_sources(node: ir.Node) -> list[ir.Node | None]:
    """What computes the float inputs, None for an input of the graph; not the constants."""
    found: list[ir.Node | None] = []
    for value in node.inputs:
        if value is None or not _is_float(value) or value.is_initializer():
            continue
        producer = value.producer()
        if producer is None or producer.op_type != "Constant":
            found.append(producer)
    return found


def _is_float(value: ir.Value) -> bool:
    return value.dtype == FLOAT


def _is_scale(value: ir.Value) -> bool:
    """Whether it is the scale of a cache."""
    return any(user.op_type == CACHED and index >= SCALES for user, index in value.uses())


def _read_by(value: ir.Value, nodes: set[ir.Node]) -> bool:
    """Whether one of the nodes reads the value as float32; a sum casts what it reads itself."""
    return any(user in nodes and user.op_type != SUM for user, _ in value.uses())


def _narrow_behind(graph: ir.Graph, value: ir.Value, wide: set[ir.Node], to: ir.DataType) -> None:
    """Cast a float32 value once for all readers that compute in the new type."""
    narrow = [(user, index) for user, index in value.uses() if user not in wide]
    if not narrow:
        return
    cast = ir.node("Cast", [value], {"to": to.value})
    cast.outputs[0].name = f"{value.name}_narrow"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(to)
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), cast)
    else:
        graph.insert_after(producer, cast)
    for user, index in narrow:
        user.replace_input_with(index, cast.outputs[0])


def _retype_node(node: ir.Node, to: ir.DataType) -> None:
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT.value:
        node.attributes["to"] = ir.AttrInt64("to", to.value)
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        _retype_constant(node, to)
    for value in node.outputs:
        if _is_float(value):
            value.type = ir.TensorType(to)


def _retype_constant(node: ir.Node, to: ir.DataType) -> None:
    """A constant that is too large is one that hides keys; the largest number does that too."""
    (attribute,) = node.attributes.values()
    values = _float_values(attribute)
    if values is None:
        return
    limit = LARGEST[to]
    kept = np.clip(values, -limit, limit).astype(to.numpy())
    node.attributes.clear()
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(kept))
    node.outputs[0].type = ir.TensorType(to)


def _float_values(attribute: ir.Attr) -> np.ndarray[Any, Any] | None:
    """What a constant holds, where that is float32."""
    if attribute.name in ("value_float", "value_floats"):
        return np.asarray(attribute.value, np.float32)
    if attribute.name == "value" and attribute.as_tensor().dtype == FLOAT:
        return attribute.as_tensor().numpy()
    return None


def _retype_initializer(value: ir.Value, to: ir.DataType) -> None:
    assert value.const_value is not None
    values = value.const_value.numpy()
    largest = float(np.abs(values).max(initial=0.0))
    limit = LARGEST[to]
    if not largest <= limit:
        message = (
            f"{value.name} holds {largest:.3g}, expected at most {limit:.3g}, the largest "
            f"{to.name.lower()}; use --dtype bfloat16 or float32"
        )
        raise LoweringError(message)
    value.const_value = ir.tensor(values.astype(to.numpy()), name=value.name)
    value.type = ir.TensorType(to)
