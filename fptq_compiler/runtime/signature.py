"""What a model takes and gives, read off its graph: with a KV cache or without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import onnx
from onnx import TensorProto

from fptq_compiler.errors import RuntimeLoadError

IDS: Final = "input_ids"
MASK: Final = "attention_mask"
LOGITS: Final = "logits"
PAST: Final = ("past_key_values.{}.key", "past_key_values.{}.value")
PRESENT: Final = ("present.{}.key", "present.{}.value")

_CACHE_TYPES: Final[Mapping[int, str]] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int4",
}
"""By the tensors' type; INT4 codes are packed two a byte along the head."""


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one model.

    Attributes:
        ids: name of the input of token ids (B, S) int64.
        takes_mask: whether there is an input attention_mask (B, P+S) int64.
        vocabulary: V of the logits (B, S, V); None where the file does not say.
        batch: B where the file fixes it; None where it is free.
        layers: pairs of keys and values in the cache; 0 without one.
        cache_type: float32, float16, int8 or int4; None without a cache.
        kv_heads: H_kv of the cache (B, H_kv, P, D).
        head_size: D, in numbers, of which int4 packs two in a byte.
    """

    ids: str
    takes_mask: bool
    vocabulary: int | None
    batch: int | None = None
    layers: int = 0
    cache_type: str | None = None
    kv_heads: int = 0
    head_size: int = 0

    @property
    def past_names(self) -> tuple[str, ...]:
        """Inputs of the cache: key and value of each layer in turn."""
        return tuple(name.format(n) for n in range(self.layers) for name in PAST)

    def cache_shape(self, batch: int, positions: int) -> list[int]:
        """The shape of each key and value: (B, H_kv, P, D), or D / 2 bytes of INT4 pairs."""
        packed = 2 if self.cache_type == "int4" else 1
        return [batch, self.kv_heads, positions, self.head_size // packed]

    @property
    def present_names(self) -> tuple[str, ...]:
        """Outputs of the grown cache, in the order of `past_names`."""
        return tuple(name.format(n) for n in range(self.layers) for name in PRESENT)


def read_signature(model: onnx.ModelProto) -> Signature:
    """Reads the signature of a model.

    Raises:
        RuntimeLoadError: it is not one from token ids to logits, or its cache is not whole.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: v for v in model.graph.input if v.name not in initializers}
    outputs = {v.name: v for v in model.graph.output}
    layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in inputs)
    # A model without a cache has kept the name that its author gave to the only input.
    ids = next(iter(inputs)) if len(inputs) == 1 else IDS
    plain = Signature(ids, MASK in inputs, _vocabulary(outputs), layers=layers)
    _check_names(plain, inputs, outputs)
    for name in (ids, MASK):
        if name in inputs and _type(inputs[name]) != TensorProto.INT64:
            kind = TensorProto.DataType.Name(_type(inputs[name]))
            message = f"the input {name} is {kind}, expected INT64"
            raise RuntimeLoadError(message)
    plain = replace(plain, batch=next(iter(_dims(inputs[ids])), None))
    return _with_cache(plain, inputs, outputs) if layers else plain


def _check_names(
    signature: Signature,
    inputs: Mapping[str, onnx.ValueInfoProto],
    outputs: Mapping[str, onnx.ValueInfoProto],
) -> None:
    """Refuses inputs that nobody could fill, and outputs that are missing."""
    wanted = {signature.ids, *signature.past_names}
    strange = set(inputs) - wanted - {MASK}
    missing = (wanted - set(inputs)) | ({LOGITS, *signature.present_names} - set(outputs))
    if strange or missing:
        message = (
            f"expected a model from {IDS}, with or without a KV cache, to {LOGITS}; missing: "
            f"{_listed(missing)}; inputs that do not belong: {_listed(strange)}"
        )
        raise RuntimeLoadError(message)


def _with_cache(
    signature: Signature,
    inputs: Mapping[str, onnx.ValueInfoProto],
    outputs: Mapping[str, onnx.ValueInfoProto],
) -> Signature:
    """Adds the cache's type and shape, which are the same for all keys and values."""
    values = [inputs[n] for n in signature.past_names]
    values += [outputs[n] for n in signature.present_names]
    kinds = {_type(value) for value in values}
    cache_type = _CACHE_TYPES.get(min(kinds)) if len(kinds) == 1 else None
    if cache_type is None:
        found = ", ".join(sorted(TensorProto.DataType.Name(kind) for kind in kinds))
        message = f"the KV cache is of {found}; expected one of FLOAT, FLOAT16, INT8, UINT8"
        raise RuntimeLoadError(message)
    shapes = {tuple(_dims(inputs[name])[1::2]) for name in signature.past_names}
    kv_heads, width = shapes.pop() if len(shapes) == 1 else (None, None)
    if kv_heads is None or width is None:
        message = (
            "the KV cache has no fixed number of heads and head size: expected the same "
            f"(B, heads, P, size) for all layers, found e.g. {_dims(values[0])}"
        )
        raise RuntimeLoadError(message)
    head_size = 2 * width if cache_type == "int4" else width
    return replace(signature, cache_type=cache_type, kv_heads=kv_heads, head_size=head_size)


def _vocabulary(outputs: Mapping[str, onnx.ValueInfoProto]) -> int | None:
    dims = _dims(outputs[LOGITS]) if LOGITS in outputs else []
    return dims[-1] if dims else None


def _type(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """The dimensions; None where one is free or not given."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
