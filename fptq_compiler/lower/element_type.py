"""The element type of a value in a graph that has been written: most say none."""

from __future__ import annotations

import onnx_ir as ir


def element_type(value: ir.Value | None) -> ir.DataType | None:
    """That of a constant, or of what makes the value; None where neither says it."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.dtype
    producer = value.producer()
    if producer is not None and producer.op_type == "QuantizeLinear":
        return element_type(producer.inputs[2])
    if producer is not None and producer.op_type == "Cast":
        return ir.DataType(producer.attributes["to"].as_int())
    return value.dtype
