"""Operators that the exporter carries as one node, for the target to expand afterwards.

torch.onnx translates a node into nodes of one graph. Some forms need more: a branch, or a value
that all layers share. Their operators go through the exporter as they are, in the domain
`fptq`, and `lower.expand` gives each its form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.values import Opset

from fptq_compiler.graph import ops
from fptq_compiler.lower.targets.schemas import FLOAT, INT, register

DOMAIN = "fptq"
register(
    DOMAIN, "CachedAttention",
    ("q", "k?", "v?", "past_key", "past_value", "mask", "positions", "cos?", "sin?",
     "key_scale?", "value_scale?"),
    ("output", "present_key", "present_value"),
    {"interleaved": INT, "heads": INT, "kv_heads": INT, "scale": FLOAT, "bits": INT,
     "softcap": FLOAT, "window": INT},
)
register(DOMAIN, "Positions", ("mask", "ids"), ("positions",), {})
register(DOMAIN, "UnitRms", ("x",), ("normalized", "inverse"), {})
register(DOMAIN, "RmsNorm", ("x", "gain?"), ("normalized",), {"epsilon": FLOAT})
register(
    DOMAIN, "Attention", ("q", "k", "v", "mask?"), ("output",),
    {"causal": INT, "scale": FLOAT, "softcap": FLOAT, "window": INT},
)
register(
    DOMAIN, "Linear", ("x", "codes", "scale", "bias?"), ("y",), {"bits": INT, "block": INT}
)
register(DOMAIN, "SumOfSquares", ("x",), ("sum",), {})
_fptq = Opset(DOMAIN, 1)


@dataclass(frozen=True)
class Carried:
    """A carried `fptq.cached_attention`: its values, and its attributes as plain numbers."""

    q: Any
    k: Any
    v: Any
    past_key: Any
    past_value: Any
    mask: Any
    positions: Any
    cos: Any
    sin: Any
    key_scale: Any
    value_scale: Any
    interleaved: bool
    heads: int
    kv_heads: int
    scale: float
    bits: int
    softcap: float
    window: int

    @classmethod
    def of(cls, node: ir.Node) -> Carried:
        """Read a carried node."""
        given: list[Any] = [*node.inputs, None, None, None, None][:11]
        numbers: dict[str, Any] = {n: a.value for n, a in node.attributes.items()}
        numbers["interleaved"] = bool(numbers["interleaved"])
        return cls(*given, **numbers)

    @property
    def head(self) -> int:
        """Channels D of a head."""
        return int(self.past_key.shape[3]) * (2 if self.bits == 4 else 1)


def carry_attention(
    q: Any, k: Any, v: Any, past_key: Any, past_value: Any, mask: Any, positions: Any,
    cos: Any, sin: Any, interleaved: bool, heads: int, kv_heads: int, scale: float, bits: int,
    key_scale: Any, value_scale: Any, softcap: float = 0.0, window: int = 0,
) -> Any:
    """The emitter of `fptq.cached_attention`."""
    return _fptq.CachedAttention(
        q, k, v, past_key, past_value, mask, positions, cos, sin, key_scale, value_scale,
        interleaved=int(interleaved), heads=heads, kv_heads=kv_heads, scale=scale, bits=bits,
        softcap=softcap, window=window,
    )


def carry_positions(mask: Any, ids: Any) -> Any:
    """The emitter of `fptq.positions`."""
    return _fptq.Positions(mask, ids)


def carry_unit_rms(x: Any) -> Any:
    """The emitter of `fptq.unit_rms`."""
    return _fptq.UnitRms(x)


def carry_plain_attention(
    q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, softcap: float = 0.0,
    window: int = 0,
) -> Any:
    """The emitter of `fptq.attention`."""
    return _fptq.Attention(
        q, k, v, mask, causal=int(causal), scale=scale, softcap=softcap, window=window
    )


def carry_linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
    """The emitter of `fptq.linear`."""
    return _fptq.Linear(x, codes, scale, bias, bits=bits, block=block)


def carry_rms_norm(x: Any, gain: Any, epsilon: float) -> Any:
    """The emitter of `fptq.rms_norm`."""
    return _fptq.RmsNorm(x, gain, epsilon=epsilon)


def carry_sum_of_squares(x: Any) -> Any:
    """The emitter of `fptq.sum_of_squares`."""
    return _fptq.SumOfSquares(x)


WITH_FLOAT32_INSIDE: dict[Any, Callable[..., Any]] = {
    ops.linear: carry_linear,
    ops.rms_norm: carry_rms_norm,
    ops.sum_of_squares: carry_sum_of_squares,
}
"""By operator, the emitters of those that compute in float32 inside, whatever the file does."""
