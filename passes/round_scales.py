"""Round all scales to a half-precision type, so that a file in that type holds them exactly.

The codes stay; a weight moves by at most 2^-11 of itself in float16, 2^-8 in bfloat16, and an
activation's grid by as much. What the program computes is then what the file computes, but for
the rounding of the values between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import set_parameter


class RoundScales(Pass):
    """Round the scales of frozen weights and activations."""

    requires = ("frozen",)
    provides = ("scales_rounded",)
    effect = Effect.APPROXIMATES

    def __init__(self, dtype: torch.dtype) -> None:
        """Take the type that the file computes in."""
        self.dtype = dtype

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Round each scale that the type does not hold yet.

        Raises:
            UnsupportedModelError: a scale is too small or too large for the type.
        """
        changed = 0
        for node in program.call_nodes(ops.fake_quantize):
            scale = node.args[1]
            assert isinstance(scale, float)
            found = self._rounded(torch.tensor(scale, dtype=torch.float32), node.name).item()
            changed += found != scale
            node.update_arg(1, found)
        for node in (*program.call_nodes(ops.linear), *program.call_nodes(ops.embedding)):
            argument = input_node(node, 2)
            name = str(argument.target)
            old = program.parameter(name)
            new = self._rounded(old, name)
            if not torch.equal(old, new):
                set_parameter(program.module, name, new)
                changed += 1
        return PassResult(changed)

    def _rounded(self, scale: Tensor, name: str) -> Tensor:
        limits = torch.finfo(self.dtype)
        if float(scale.min()) < limits.smallest_normal or float(scale.max()) > limits.max:
            message = (
                f"{name} has scales of {float(scale.min()):.3g} to {float(scale.max()):.3g}, "
                f"expected {limits.smallest_normal:.3g} to {limits.max:.3g}, what {self.dtype} "
                "holds in full precision; use --dtype float32"
            )
            raise UnsupportedModelError(message)
        return scale.to(self.dtype).float()
