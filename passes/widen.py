"""Turn a half-precision graph into a float32 one, so that folding and ranges do not round twice.

Weights keep their values (every half-precision number is a float32 number); the arithmetic
between them becomes exact to float32, which is closer to the model's function, not further.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import set_parameter

HALF = (torch.float16, torch.bfloat16)


class Widen(Pass):
    """Make every half-precision parameter, buffer and cast float32."""

    provides = ("wide",)

    def run(self, program: Program) -> PassResult:
        """Rewrite parameters, literal dtypes and the recorded values."""
        changed = 0
        shared: dict[int, Tensor] = {}
        tensors = [
            *program.module.named_parameters(remove_duplicate=False),
            *program.module.named_buffers(remove_duplicate=False),
        ]
        for name, value in tensors:
            if value.dtype in HALF:
                wide = shared.setdefault(id(value), value.detach().float())
                set_parameter(program.module, name, wide)
                changed += 1
        for part in program.module.modules():
            if isinstance(part, GraphModule):  # the model, and what a wrapper operator calls
                _widen_nodes(part)
        return PassResult(changed)


def _widen_nodes(part: GraphModule) -> None:
    for node in part.graph.nodes:
        node.args = map_aggregate(node.args, _wide_dtype)
        node.kwargs = map_aggregate(node.kwargs, _wide_dtype)
        if "val" in node.meta:
            node.meta["val"] = map_aggregate(node.meta["val"], _wide_value)
    part.recompile()


def _wide_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def _wide_value(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
