"""Weights that lie in files stay there until the ONNX file is written, one after another.

torch.export and torch.onnx look at shapes only, so they get memory that nobody touches; the
values take its place in the translated model, and are read as it is written.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from torch.fx import GraphModule

from fptq_compiler.graph.stored import StoredParameter
from fptq_compiler.graph.surgery import set_parameter


def take_stored(module: GraphModule) -> dict[str, StoredParameter]:
    """Put parameters without values in the place of stored ones; gives those, by name."""
    stored = {
        name: value
        for name, value in module.named_parameters(remove_duplicate=False)
        if isinstance(value, StoredParameter)
    }
    for name, value in stored.items():
        owner, _, last = name.rpartition(".")
        delattr(module.get_submodule(owner), last)
        set_parameter(module, name, torch.empty(value.shape, dtype=value.dtype))
    return stored


def read_when_written(model: ir.Model, stored: dict[str, StoredParameter]) -> None:
    """Let the initialisers of these names be what the files hold."""
    for name, parameter in stored.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.LazyTensor(
            partial(_read, name, parameter), value.const_value.dtype,
            ir.Shape(tuple(parameter.shape)), name=name,
        )


def _read(name: str, parameter: StoredParameter) -> ir.TensorProtocol:
    return ir.tensor(parameter.read().numpy(), name=name)
