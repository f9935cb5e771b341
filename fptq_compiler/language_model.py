"""What a program must take and give to be compiled: token ids in, logits out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.program import Program, source_line


def refuse_inputs(program: Program) -> None:
    """Refuse float inputs but masks: calibration and proofs have no values for them.

    Raises:
        UnsupportedModelError: the input, what it is and what was expected.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not node.users or "mask" in node.name:
            continue
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            message = (
                f"input {node.name} is {_words(value)}, expected token ids, masks and positions "
                "only: there are no values to calibrate it on, nor to prove a rewrite with. "
                "Export the model with token ids as its input, and this one computed or fixed "
                "inside"
            )
            raise UnsupportedModelError(message)


def refuse_fixed_sizes(program: Program) -> None:
    """Refuse token ids of one size only: proofs, calibration and use take others.

    Raises:
        UnsupportedModelError: which size is fixed, and how to free it.
    """
    spec = program.inputs[program.ids_index]
    fixed = [
        f"{axis} to {size}"
        for axis, size in zip(("batch", "sequence"), spec.dims, strict=False)
        if isinstance(size, int)
    ]
    if fixed:
        message = (
            f"the export fixes the {' and the '.join(fixed)} in {spec.name}, expected both free. "
            "Export the model with dynamic_shapes={0: torch.export.Dim.DYNAMIC, "
            "1: torch.export.Dim.DYNAMIC} for its token ids; torch then names what fixes them"
        )
        raise UnsupportedModelError(message)


def refuse_outputs(program: Program) -> None:
    """Refuse a model whose first output is no logits: of all positions, or of the sequence.

    Raises:
        UnsupportedModelError: what it gives, and what was expected.
    """
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    found = output.args[0]
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    values = [n.meta.get("val") if isinstance(n, Node) else n for n in outputs]
    listed = ", ".join(_words(value) for value in values)
    first = values[0] if values else None
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.dim() not in (2, 3):
        where = source_line(outputs[0]) if outputs and isinstance(outputs[0], Node) else ""
        message = (
            f"the model gives {listed or 'nothing'}, expected logits of a float type first, "
            f"(batch, sequence, vocabulary), or (batch, classes). {where}\n"
            "Export a forward that returns the logits."
        )
        raise UnsupportedModelError(message)
    rows = {
        n.args[0].meta["val"].shape[0]
        for n in program.call_nodes(torch.ops.aten.embedding.default)
        if isinstance(n.args[0], Node)
    }
    others = [v for v in values[1:] if isinstance(v, Tensor) and v.dim() == 3]
    if first.shape[-1] not in rows and any(v.shape[-1] in rows for v in others):
        message = (
            f"the model gives {listed}, and the first is not as wide as the vocabulary, while "
            "another is: expected the logits first. Export a forward that returns them first, "
            "or alone"
        )
        raise UnsupportedModelError(message)


def _words(value: object) -> str:
    """An output in words: its type and shape."""
    if not isinstance(value, Tensor):
        return "None" if value is None else type(value).__name__
    sizes = ", ".join(str(size) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')} ({sizes})"
