"""Program -> torch.export -> ONNX, with each composite operator translated by the target."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fptq_compiler.errors import LoweringError
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.targets import qdq


class _Positional(nn.Module):
    """The program's module with only its logits as output."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program_module = program.module

    def forward(self, *inputs: Tensor) -> Tensor:
        """The first output of the graph."""
        found = self.program_module(*inputs)
        return found[0] if isinstance(found, (tuple, list)) else found


def to_onnx(program: Program, *, integer_activations: bool) -> ir.Model:
    """Translate the program, with symbolic batch and sequence where it has them.

    Raises:
        LoweringError: torch.export or torch.onnx refuses the graph; the cause is quoted.
    """
    example = [
        torch.zeros([d if isinstance(d, int) else size for d, size in zip(s.dims, (2, 7), strict=False)],
                    dtype=s.dtype)
        for s in program.inputs
    ]
    shapes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(s.dims) if isinstance(d, str)}
        for s in program.inputs
    )
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                program.module, tuple(example), dynamic_shapes=shapes, strict=False
            )
            found = torch.onnx.export(
                exported,
                (),
                opset_version=qdq.OPSET,
                optimize=False,
                verbose=False,
                input_names=[s.name for s in program.inputs],
                output_names=["logits"],
                custom_translation_table=qdq.translations(
                    integer_activations=integer_activations
                ),
            )
    except Exception as error:
        message = f"torch.onnx could not translate the frozen graph: {error}"
        raise LoweringError(message) from error
    assert found is not None
    return found.model


logger = logging.getLogger(__name__)
