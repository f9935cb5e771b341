"""Turn INT8 initialisers that a Cast narrows to INT4 into packed INT4 initialisers.

The exporter folds such a Cast only for small weights; here all are folded, two codes a byte.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir


def pack_int4(model: ir.Model) -> int:
    """Fold every Cast to INT4 of an initialiser; gives how many. Done in place."""
    packed = 0
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.INT4.value:
            continue
        source, narrow = node.inputs[0], node.outputs[0]
        if source is None or source.const_value is None:
            continue
        codes = source.const_value.numpy().astype(np.int8)
        if codes.min() < -8 or codes.max() > 7:
            message = f"{source.name}: codes {codes.min()}..{codes.max()} do not fit INT4"
            raise ValueError(message)
        name = str(source.name)
        tensor = ir.tensor(codes.astype(ml_dtypes.int4), name=name)
        replacement = ir.Value(
            name=f"{name}_int4", shape=ir.Shape(codes.shape),
            type=ir.TensorType(ir.DataType.INT4), const_value=tensor,
        )
        tensor.name = f"{name}_int4"
        graph.register_initializer(replacement)
        narrow.replace_all_uses_with(replacement)
        graph.remove(node, safe=True)
        if not source.uses():
            del graph.initializers[name]
        replacement.name = name
        packed += 1
    return packed
