"""Single operators as ONNX models: matmuls of several kinds, and attention on a cache.

A matmul of few rows takes as long as its weight takes to come from memory. One weight run again
and again would come from a cache instead, so a graph holds as many different ones as are larger
than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fptq_compiler.bench.measure import Step
from fptq_compiler.bench.result import Settings
from fptq_compiler.errors import RuntimeLoadError
from fptq_compiler.runtime.placement import ELEMENTS, device_of
from fptq_compiler.runtime.session import available_providers, session_options

Array = np.ndarray[Any, Any]
Form = Literal["MatMul", "MatMulInteger", "MatMulNBits"]

CONTRIB: Final = "com.microsoft"
BLOCK: Final = 32
STREAMED: Final = 256 * 2**20
"""Bytes of weights in a graph for few rows: above the largest cache of a GPU."""
MOST_COPIES: Final = 32
FEW_ROWS: Final = 16
_SEED: Final = 0
_WHOLLY: Final = {"session.disable_cpu_ep_fallback": "1"}
_OPSETS: Final = (helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1))
_IR_VERSION: Final = 10


@dataclass(frozen=True)
class Matmul:
    """(M, K) times (K, N), of one form.

    Attributes:
        form: MatMul in float, MatMulInteger of INT8 by INT8, or MatMulNBits of INT4 weights.
        rows: M.
        inner: K.
        columns: N.
        dtype: of the activations that are float.
    """

    form: Form
    rows: int
    inner: int
    columns: int
    dtype: np.dtype[Any]

    @property
    def weight_bytes(self) -> int:
        """Of one weight, scales included."""
        count = self.inner * self.columns
        if self.form == "MatMulInteger":
            return count
        if self.form == "MatMulNBits":
            return count // 2 + count // BLOCK * self.dtype.itemsize
        return count * self.dtype.itemsize

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    def copies(self, streamed: int = STREAMED) -> int:
        """How many different weights the graph has."""
        if self.rows > FEW_ROWS:
            return 1
        return min(MOST_COPIES, math.ceil(streamed / self.weight_bytes))

    def model(self, streamed: int = STREAMED) -> onnx.ModelProto:
        """Gives the graph, an output a weight."""
        generator = np.random.default_rng(_SEED)
        numbers = range(self.copies(streamed))
        nodes, weights = [], []
        for n in numbers:
            inputs, made = self._weight(n, generator)
            weights += made
            nodes.append(self._node(n, inputs))
        result = "int32" if self.form == "MatMulInteger" else self.dtype
        outputs = [_value(f"y{n}", result, (self.rows, self.columns)) for n in numbers]
        return _model(nodes, [_value("x", self.activation, (self.rows, self.inner))], outputs,
                      weights)

    @property
    def activation(self) -> np.dtype[Any]:
        """Type of what is multiplied by the weight."""
        return np.dtype("int8") if self.form == "MatMulInteger" else self.dtype

    def feeds(self) -> dict[str, Array]:
        """Draws the input."""
        return {"x": _draw(np.random.default_rng(_SEED), (self.rows, self.inner), self.activation)}

    def _node(self, number: int, inputs: list[str]) -> onnx.NodeProto:
        attributes: dict[str, Any] = {}
        if self.form == "MatMulNBits":
            attributes = {"K": self.inner, "N": self.columns, "bits": 4, "block_size": BLOCK,
                          "accuracy_level": 1, "domain": CONTRIB}
        return helper.make_node(self.form, ["x", *inputs], [f"y{number}"], **attributes)

    def _weight(
        self, number: int, generator: np.random.Generator
    ) -> tuple[list[str], list[onnx.TensorProto]]:
        name, blocks = f"w{number}", self.inner // BLOCK
        if self.form != "MatMulNBits":
            dtype = np.dtype("int8") if self.form == "MatMulInteger" else self.dtype
            values = {name: _draw(generator, (self.inner, self.columns), dtype)}
        else:
            packed = (self.columns, blocks, BLOCK // 2)
            values = {
                name: generator.integers(0, 256, packed, np.uint8),
                f"{name}_scale": _draw(generator, (self.columns * blocks,), self.dtype),
            }
        return list(values), [numpy_helper.from_array(v, k) for k, v in values.items()]


@dataclass(frozen=True)
class CachedAttention:
    """One GroupQueryAttention of S tokens behind P cached ones.

    Attributes:
        cache: float16 or float32, int8, int4.
        tokens: S.
        past: P.
        heads: of the queries.
        kv_heads: of keys and values.
        width: of a head.
        dtype: of queries, and of a float cache.
    """

    cache: str
    tokens: int
    past: int
    heads: int
    kv_heads: int
    width: int
    dtype: np.dtype[Any]

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, past and new."""
        return 2 * math.prod(self._cache_shape(self.past + self.tokens)) * self._element.itemsize

    @property
    def operations(self) -> int:
        """Of both matmuls, each query with all that stands before it."""
        seen = self.tokens * self.past + self.tokens * (self.tokens + 1) // 2
        return 4 * self.heads * self.width * seen

    @property
    def _element(self) -> np.dtype[Any]:
        return np.dtype(ELEMENTS[self.cache][0])

    def _cache_shape(self, positions: int) -> tuple[int, ...]:
        width = self.width // 2 if self.cache == "int4" else self.width
        return (1, self.kv_heads, positions, width)

    def model(self) -> onnx.ModelProto:
        """Gives the graph: output, present key and value."""
        kinds = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        inputs = [
            _value(name, self.dtype, (1, self.tokens, heads * self.width))
            for name, heads in kinds.items()
        ]
        past, total = self._cache_shape(self.past), self._cache_shape(self.past + self.tokens)
        inputs += [_value(name, self._element, past) for name in ("past_k", "past_v")]
        inputs += [_value("last", "int32", (1,)), _value("total", "int32", ())]
        outputs = [_value("y", self.dtype, (1, self.tokens, self.heads * self.width))]
        outputs += [_value(name, self._element, total) for name in ("present_k", "present_v")]
        names, constants = [v.name for v in inputs], []
        attributes: dict[str, Any] = {}
        if self._element.kind != "f":
            bits = 4 if self.cache == "int4" else 8
            attributes = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR",
                          "kv_cache_bit_width": bits}
            names += [*[""] * 5, "scale", "scale"]
            scale = np.array([0.5 if bits == 4 else 0.03], np.float32)
            constants = [numpy_helper.from_array(scale, "scale")]
        node = helper.make_node(
            "GroupQueryAttention", names, [v.name for v in outputs], domain=CONTRIB,
            num_heads=self.heads, kv_num_heads=self.kv_heads, **attributes,
        )
        return _model([node], inputs, outputs, constants)

    def feeds(self) -> dict[str, Array]:
        """Draws queries, keys, values and the past."""
        generator = np.random.default_rng(_SEED)
        kinds = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        found: dict[str, Array] = {
            name: _draw(generator, (1, self.tokens, heads * self.width), self.dtype)
            for name, heads in kinds.items()
        }
        for name in ("past_k", "past_v"):
            found[name] = _draw(generator, self._cache_shape(self.past), self._element)
        total = self.past + self.tokens
        last, length = np.array([total - 1], np.int32), np.array(total, np.int32)
        return {**found, "last": last, "total": length}


def step_of(
    model: onnx.ModelProto, feeds: Mapping[str, Array], settings: Settings,
    config: Mapping[str, str],
) -> Step:
    """Opens a session on a model and binds a call whose values stay on the device.

    Args:
        model: a graph.
        feeds: its inputs.
        settings: whose provider and threads count.
        config: entries of the session's configuration.

    Raises:
        RuntimeLoadError: the provider is not there, or cannot run all of the model itself.
    """
    providers = available_providers([settings.provider or "cpu"])
    wholly = {} if providers[0].startswith("CPU") else _WHOLLY
    options = session_options({**config, **wholly}, settings.threads)
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=providers
        )
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        message = f"{providers[0]} cannot run {model.graph.node[0].op_type}: {error}"
        raise RuntimeLoadError(message) from error
    device, binding = device_of(session), session.io_binding()
    for name, array in feeds.items():
        place = device if array.shape else "cpu"  # kernels read lengths, which are scalars, there
        binding.bind_ortvalue_input(
            name, onnxruntime.OrtValue.ortvalue_from_numpy(array, place, 0)
        )
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)

    def step() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return step


def _draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Numbers around zero, or codes over the type's whole range."""
    if dtype.kind == "f":
        return generator.standard_normal(shape, np.float32).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def _value(name: str, dtype: Any, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    element: TensorProto.DataType = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, shape)


def _model(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto], constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "operator", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=_OPSETS, ir_version=_IR_VERSION)
