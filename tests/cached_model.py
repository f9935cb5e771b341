"""A tiny language model with a KV cache, or without one, in plain ONNX operators.

Two layers of attention with two query heads to a KV head, and learned positions that are counted
along the attention mask. Logits depend on every cached token, on their order and on the mask, so
that decoding with a cache equals one run over the whole sequence only if the cache is right. The
second layer's keys and values depend on what the first one attended to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 23
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 6
HIDDEN = HEADS * HEAD_SIZE
POSITIONS = 64
SCALE = 0.05  # of INT8 codes; what lies beyond 127 of them is clipped
SCALE_INT4 = 0.4
CACHE_TYPES = ("float32", "float16", "int8", "int4")

_ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int4": TensorProto.UINT8,
}


class _Graph:
    """Collects nodes and initialisers; a value is named after the node that gives it."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: object) -> str:
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        values = self._random.normal(size=shape) / np.sqrt(shape[0])
        return self.constant(values, np.float32)

    def table(self, rows: int) -> str:
        return self.constant(self._random.normal(size=(rows, HIDDEN)), np.float32)

    def cast(self, value: str, to: int) -> str:
        return self.op("Cast", value, to=to)

    def scaled(self, value: str, factor: float) -> str:
        return self.op("Mul", value, self.constant(factor, np.float32))


def write_cached_model(
    path: Path,
    cache: str | None,
    *,
    seed: int = 0,
    external: bool = False,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the model.

    Args:
        path: of the ONNX file.
        cache: float32, float16, int8, int4, or None for a model without a cache.
        seed: of the weights; the same weights for every type of cache.
        external: whether the weights lie in a file beside it.
        metadata: of the file.
    """
    graph = _Graph(seed)
    _body(graph, cache)
    inputs = [_value("input_ids", TensorProto.INT64, ["B", "S"])]
    outputs = [_value("logits", TensorProto.FLOAT, ["B", "S", VOCABULARY])]
    if cache:
        inputs.append(_value("attention_mask", TensorProto.INT64, ["B", "T"]))
        inputs += _cache_values("past_key_values", cache, "P")
        outputs += _cache_values("present", cache, "T")
    made = helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    beside = {"location": f"{path.name}.data", "size_threshold": 256}
    onnx.save(model, path, save_as_external_data=external, **beside)
    return path


def _cache_values(prefix: str, cache: str, length: str) -> list[onnx.ValueInfoProto]:
    width = HEAD_SIZE // 2 if cache == "int4" else HEAD_SIZE
    names = [f"{prefix}.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    shape = ["B", KV_HEADS, length, width]
    return [_value(name, _ELEMENTS[cache], shape) for name in names]


def _body(graph: _Graph, cache: str | None) -> None:
    """From input_ids, and attention_mask if there is a cache, to logits."""
    mask = "attention_mask" if cache else _ones_like_ids(graph)
    total = graph.op("Shape", mask, start=1)
    past_length = graph.op("Sub", total, graph.op("Shape", "input_ids", start=1))
    # Positions are counted along the mask, so that padding on the left shifts nothing.
    counted = graph.op("Sub", graph.op("CumSum", mask, graph.constant(1)), graph.constant(1))
    every = graph.op("Max", counted, graph.constant(0))
    positions = graph.op("Slice", every, past_length, total, graph.constant([1]))
    tokens = graph.op("Gather", graph.table(VOCABULARY), "input_ids")
    stream = graph.op("Add", tokens, graph.op("Gather", graph.table(POSITIONS), positions))
    bias = _mask_bias(graph, mask, past_length, total)
    for layer in range(LAYERS):
        stream = graph.op("Add", stream, _attention(graph, stream, bias, layer, cache))
    graph.op("MatMul", stream, graph.weight(HIDDEN, VOCABULARY), name="logits")


def _value(name: str, element: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def _ones_like_ids(graph: _Graph) -> str:
    return graph.op("Add", graph.op("Mul", "input_ids", graph.constant(0)), graph.constant(1))


def _mask_bias(graph: _Graph, mask: str, past_length: str, total: str) -> str:
    """(B, 1, S, T): 0 where a token may look, -1e9 behind it and at padding."""
    zero, one = graph.constant(0), graph.constant(1)
    scalar = graph.constant([])
    first = graph.op("Reshape", past_length, scalar)
    last = graph.op("Reshape", total, scalar)
    rows = graph.op("Unsqueeze", graph.op("Range", first, last, one), graph.constant([1]))
    columns = graph.op("Range", zero, last, one)
    causal = graph.op("LessOrEqual", columns, rows)
    tokens = graph.op("Unsqueeze", graph.cast(mask, TensorProto.BOOL), graph.constant([1, 2]))
    allowed = graph.cast(graph.op("And", causal, tokens), TensorProto.FLOAT)
    blocked = graph.op("Sub", graph.constant(1.0, np.float32), allowed)
    return graph.scaled(blocked, -1e9)


def _attention(graph: _Graph, stream: str, bias: str, layer: int, cache: str | None) -> str:
    query = _heads(graph, stream, HEADS)
    key = _cached(graph, _heads(graph, stream, KV_HEADS), f"{layer}.key", cache)
    value = _cached(graph, _heads(graph, stream, KV_HEADS), f"{layer}.value", cache)
    transposed = graph.op("Transpose", _repeated(graph, key), perm=[0, 1, 3, 2])
    scores = graph.scaled(graph.op("MatMul", query, transposed), HEAD_SIZE**-0.5)
    weights = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
    read = graph.op("MatMul", weights, _repeated(graph, value))
    rows = graph.op("Transpose", read, perm=[0, 2, 1, 3])
    merged = graph.op("Reshape", rows, graph.constant([0, 0, HIDDEN]))
    return graph.op("MatMul", merged, graph.weight(HIDDEN, HIDDEN))


def _heads(graph: _Graph, stream: str, heads: int) -> str:
    """(B, S, HIDDEN) projected to (B, heads, S, HEAD_SIZE)."""
    projected = graph.op("MatMul", stream, graph.weight(HIDDEN, heads * HEAD_SIZE))
    split = graph.op("Reshape", projected, graph.constant([0, 0, heads, HEAD_SIZE]))
    return graph.op("Transpose", split, perm=[0, 2, 1, 3])


def _repeated(graph: _Graph, value: str) -> str:
    """Each KV head once for each of its query heads."""
    owners = [head * KV_HEADS // HEADS for head in range(HEADS)]
    return graph.op("Gather", value, graph.constant(owners), axis=1)


def _cached(graph: _Graph, value: str, name: str, cache: str | None) -> str:
    """Past and new values, all as they stand in the cache, back in float."""
    if cache is None:
        return value
    present = graph.op(
        "Concat",
        f"past_key_values.{name}",
        _stored(graph, value, cache),
        name=f"present.{name}",
        axis=2,
    )
    if cache == "int4":
        codes = graph.cast(present, TensorProto.INT32)
        sixteen = graph.constant(16, np.int32)
        low, high = graph.op("Mod", codes, sixteen), graph.op("Div", codes, sixteen)
        last = graph.constant([-1])
        halves = [graph.op("Unsqueeze", half, last) for half in (low, high)]
        pairs = graph.op("Concat", *halves, axis=-1)
        unsigned = graph.op("Reshape", pairs, graph.constant([0, 0, -1, HEAD_SIZE]))
        signed = graph.op("Sub", unsigned, graph.constant(8, np.int32))
        return graph.scaled(graph.cast(signed, TensorProto.FLOAT), SCALE_INT4)
    plain = graph.cast(present, TensorProto.FLOAT)
    return graph.scaled(plain, SCALE) if cache == "int8" else plain


def _stored(graph: _Graph, value: str, cache: str) -> str:
    """A new key or value in the cache's type; int4 codes two a byte, the lower half first."""
    if cache in ("float32", "float16"):
        return graph.cast(value, _ELEMENTS[cache])
    scale, lowest, highest = (SCALE, -128, 127) if cache == "int8" else (SCALE_INT4, -8, 7)
    rounded = graph.op("Round", graph.scaled(value, 1 / scale))
    limits = [graph.constant(limit, np.float32) for limit in (lowest, highest)]
    codes = graph.op("Clip", rounded, *limits)
    if cache == "int8":
        return graph.cast(codes, TensorProto.INT8)
    shape = graph.constant([0, 0, -1, HEAD_SIZE // 2, 2])
    pairs = graph.op("Reshape", codes, shape)
    unsigned = graph.op("Add", pairs, graph.constant(8, np.float32))
    packed = graph.op("MatMul", unsigned, graph.constant([1, 16], np.float32))
    return graph.cast(packed, TensorProto.UINT8)
