"""Turn INT8 initialisers that a Cast narrows to INT4 into packed INT4 initialisers.

The exporter folds such a Cast only for small weights; here all are folded, two codes a byte.
"""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir


def pack_int4(model: ir.Model) -> int:
    """Fold every Cast to INT4 of an initialiser; gives how many there are. Done in place."""
    graph = model.graph
    packed: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.INT4.value:
            continue
        source, narrow = node.inputs[0], node.outputs[0]
        if source is None or source.const_value is None:
            continue
        name = str(source.name)
        if name not in packed:
            packed[name] = _packed(name, source.const_value)
        narrow.replace_all_uses_with(packed[name])
        graph.remove(node, safe=True)
    for name, value in packed.items():
        if graph.initializers[name].uses():
            value.name = f"{name}_int4"
        else:
            del graph.initializers[name]
        graph.register_initializer(value)
    return len(packed)


def _packed(name: str, codes: ir.TensorProtocol) -> ir.Value:
    """The codes in INT4, narrowed when they are written: a copy of all would double them."""
    values = codes.numpy()
    if values.min() < -8 or values.max() > 7:
        message = f"{name}: codes {values.min()}..{values.max()} do not fit INT4"
        raise ValueError(message)
    shape = ir.Shape(codes.shape.numpy())
    narrowed = ir.LazyTensor(partial(_narrowed, name, codes), ir.DataType.INT4, shape, name=name)
    return ir.Value(
        name=name, shape=shape, type=ir.TensorType(ir.DataType.INT4), const_value=narrowed
    )


def _narrowed(name: str, codes: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(codes.numpy().astype(np.int8, copy=False).astype(ml_dtypes.int4), name=name)
