"""Schemas of operators outside the standard domain, so that emitters can name them.

The names, order and defaults of com.microsoft's are those of ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import onnx
from onnx.defs import OpSchema

VERSION: Final = 1
INT, FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT
TENSORS: Final = [
    f"tensor({kind})"
    for kind in ("float", "float16", "bfloat16", "bool", "int8", "uint8", "int32", "int64")
]


def register(
    domain: str,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, OpSchema.AttrType],
) -> None:
    """Register an operator once; a parameter whose name ends in `?` is optional."""
    if onnx.defs.has(name, VERSION, domain):
        return
    constraints: list[tuple[str, list[str], str]] = []
    parameters: dict[str, Any] = {}
    for kind, names in (("inputs", inputs), ("outputs", outputs)):
        parameters[kind] = []
        for parameter in names:
            plain = parameter.rstrip("?")
            letter = f"T_{kind}_{plain}"
            constraints.append((letter, TENSORS, "any tensor"))
            option = OpSchema.FormalParameterOption
            chosen = option.Optional if parameter.endswith("?") else option.Single
            parameters[kind].append(
                OpSchema.FormalParameter(plain, letter, param_option=chosen)
            )
    onnx.defs.register_schema(
        OpSchema(
            name, domain, VERSION,
            type_constraints=constraints,
            attributes=[
                OpSchema.Attribute(key, kind, "", required=False)
                for key, kind in attributes.items()
            ],
            **parameters,
        )
    )
