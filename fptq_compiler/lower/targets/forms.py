"""Which forms a frozen program takes, whatever the target."""

from __future__ import annotations

from dataclasses import dataclass

from fptq_compiler.graph.program import Program


@dataclass(frozen=True)
class Forms:
    """How the linears of a program are quantised.

    Attributes:
        quantized_activations: linear inputs are quantised.
        integer_linears: they are, and no weight has a scale a block.
    """

    quantized_activations: bool
    integer_linears: bool


def forms_of(program: Program) -> Forms:
    """Read the forms off a frozen program."""
    quantized = any(q.role == "linear input" for q in program.activation_quantizers)
    blocked = any(q.block for q in program.weight_quantizers)
    return Forms(quantized, quantized and not blocked)
