"""Export a module so that batch and sequence stay dynamic, or say which one did not."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim

from fptq_compiler.errors import CaptureError

logger = logging.getLogger(__name__)

_AXES = ("batch", "sequence")
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool})


def export_dynamic(
    module: torch.nn.Module, example_inputs: Sequence[Any], *, origin: str,
    longest: int | None = None,
) -> torch.export.ExportedProgram:
    """Export in evaluation mode without gradients; weights stay where they are.

    Every integer or boolean input of rank 2 gets dimension 0 as batch and 1 as sequence; other
    inputs keep the shape of the example. torch treats a size of one as fixed, so an example of
    one row or one column is repeated.

    Args:
        module: any module whose positional inputs are tensors.
        example_inputs: one example per positional input, ids of shape [B, S].
        origin: name of the model, for messages.
        longest: a bound on the sequence, in tokens; None without one.

    Raises:
        CaptureError: the module has no such input, cannot be traced, or fixes a dimension.
    """
    examples = _at_least_two(tuple(example_inputs))
    dynamic = [index for index, example in enumerate(examples) if _is_ids(example)]
    if not dynamic:
        found = ", ".join(_describe(example) for example in examples) or "nothing"
        message = (
            f"{origin}: no input is an integer tensor of shape [batch, sequence]; the example "
            f"inputs are {found}. Give example token ids of rank 2."
        )
        raise CaptureError(message)
    shapes = tuple(
        {0: Dim.AUTO, 1: Dim.AUTO(max=longest)} if index in dynamic else _static(example)
        for index, example in enumerate(examples)
    )
    try:
        # Without no_grad, torch wraps parts of some models (RoPE) in an operator that only
        # switches gradients off, and hides their arithmetic in a subgraph.
        with evaluating(module), torch.no_grad():
            program = torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the model's code raises
        reason = str(error).strip()[:600] or type(error).__name__
        message = (
            f"{origin}: torch.export cannot trace the model: {reason}. The forward must take "
            "tensors by position and must not branch on their values."
        )
        raise CaptureError(message) from error
    _refuse_specialised(program, module, dynamic, origin)
    return program


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode, and each back as it was."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def _at_least_two(examples: tuple[Any, ...]) -> tuple[Any, ...]:
    """Repeat ids of one row or one column: torch would fix a dimension of size one."""
    shapes = {tuple(example.shape) for example in examples if _is_ids(example)}
    if len(shapes) != 1:
        return examples
    (rows, columns) = shapes.pop()
    repeats = (2 if rows == 1 else 1, 2 if columns == 1 else 1)
    return tuple(
        example.repeat(*repeats) if _is_ids(example) and repeats != (1, 1) else example
        for example in examples
    )


def _is_ids(example: object) -> bool:
    return isinstance(example, torch.Tensor) and example.ndim == 2 and example.dtype in _INTEGERS


def _static(example: object) -> Mapping[int, Any] | None:
    return {} if isinstance(example, torch.Tensor) else None


def _describe(example: object) -> str:
    if isinstance(example, torch.Tensor):
        return f"{example.dtype} {list(example.shape)}"
    return type(example).__name__


def _refuse_specialised(
    program: torch.export.ExportedProgram,
    module: torch.nn.Module,
    dynamic: Sequence[int],
    origin: str,
) -> None:
    """Both dimensions of every dynamic input must be free symbols, each its own."""
    names = list(inspect.signature(module.forward).parameters)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [placeholders[str(name)] for name in program.graph_signature.user_inputs]
    for index in dynamic:
        shape = inputs[index].meta["val"].shape
        name = names[index] if index < len(names) else inputs[index].name
        for axis, size in zip(_AXES, shape, strict=True):
            symbolic = isinstance(size, torch.SymInt) and size.node.expr.is_symbol
            if not symbolic:
                message = (
                    f"{origin}: the {axis} dimension of {name!r} became {size} while exporting, "
                    "expected it to stay free. The model's code branches on it or was written "
                    "for one size; give an example of another size or change the forward."
                )
                raise CaptureError(message)
        if str(shape[0]) == str(shape[1]):
            message = (
                f"{origin}: the model ties batch and sequence of {name!r} to the same size. "
                "Give an example whose batch and sequence differ, or change the forward."
            )
            raise CaptureError(message)
