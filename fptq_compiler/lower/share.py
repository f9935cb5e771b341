"""One initialiser for all that are equal: masks, tables and scales that layers have alike."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256

import onnx_ir as ir

LEAST_BYTES = 1024  # below, a name of its own is worth more than the bytes


def share_equal(model: ir.Model, apart: Collection[str] = ()) -> int:
    """Let equal initialisers be one; gives how many went. Done in place.

    Args:
        model: whose main graph is searched; branches have no initialisers.
        apart: names that stay, whatever they hold: ONNX Runtime fuses no INT4 weight that two
            matmuls read, and the comparison with the program looks for every weight by name.
    """
    known: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    gone = 0
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < LEAST_BYTES or name in apart:
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), sha256(tensor.tobytes()).digest())
        first = known.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            del model.graph.initializers[name]
            gone += 1
    return gone
