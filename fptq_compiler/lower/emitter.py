"""Make ONNX nodes as one writes formulas: `op.Add(a, op.Mul(b, c))`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

from fptq_compiler.lower.targets.types import FLOAT

Emit = Callable[..., Any]


class Emitter:
    """Collects nodes; any attribute is an operator of the standard domain.

    Attributes:
        nodes: what was made, in order.
        initializers: what they read that is no node's output.
        float_type: number of the element type that the model computes in.
    """

    def __init__(
        self, prefix: str, shared: Emitter | None = None, float_type: int = FLOAT
    ) -> None:
        """Start empty.

        Args:
            prefix: of the names of all values, unique in the model.
            shared: takes what `once` makes; None for this one itself.
            float_type: number of the element type that the model computes in.
        """
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.float_type = float_type
        self._prefix = prefix
        self._numbers = count()
        self._shared = shared
        self._known: dict[Hashable, Any] = {}

    def __getattr__(self, op_type: str) -> Emit:
        if op_type.startswith("_"):
            raise AttributeError(op_type)
        return partial(self.make, op_type)

    def make(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """A node's output, or its outputs where there are several."""
        values = [
            ir.Value(name=f"{self._prefix}_{next(self._numbers)}") for _ in range(outputs)
        ]
        self.nodes.append(
            ir.node(op_type, inputs, attributes, domain=domain, outputs=values)
        )
        return values[0] if outputs == 1 else tuple(values)

    def once(self, key: Hashable, make: Callable[[Emitter], Any]) -> Any:
        """What `make` gives the first time that this key is asked for: shared by all layers."""
        home = self._shared or self
        if key not in home._known:
            home._known[key] = make(home)
        return home._known[key]

    def ints(self, *values: int) -> Any:
        """A constant list of int64."""
        return self.Constant(value_ints=list(values))

    def float32(self, value: float) -> Any:
        """A constant float32 scalar, whatever the model computes in."""
        return self.Constant(value_float=value)

    def wide(self, x: Any) -> Any:
        """A value of the model's float type in float32."""
        return x if self.float_type == FLOAT else self.Cast(x, to=FLOAT)

    def narrow(self, x: Any) -> Any:
        """A float32 value in the model's float type."""
        return x if self.float_type == FLOAT else self.Cast(x, to=self.float_type)

    def initializer(self, name: str, values: np.ndarray[Any, Any]) -> Any:
        """A tensor of the model."""
        tensor = ir.tensor(values, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value

    def int(self, value: int) -> Any:
        """A constant int64 scalar."""
        return self.Constant(value_int=value)

    def float(self, value: float) -> Any:
        """A constant scalar in the model's float type."""
        if self.float_type == FLOAT:
            return self.float32(value)
        dtype = ir.DataType(self.float_type).numpy()
        return self.Constant(value=ir.tensor(np.asarray(value, dtype)))

    def branch(self, name: str, body: Callable[[Emitter], Sequence[ir.Value]]) -> ir.Graph:
        """A subgraph without inputs, for If: it sees the values around it."""
        inner = Emitter(f"{self._prefix}_{name}", self._shared or self, self.float_type)
        results = body(inner)
        return ir.Graph((), results, nodes=inner.nodes, name=name)
