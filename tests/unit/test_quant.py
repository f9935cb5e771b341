"""The quantiser is the runtime's bit for bit, with straight-through gradients."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from fptq_compiler.quant import (
    Grid,
    PerBlock,
    PerChannel,
    PerTensor,
    dequantize,
    fake_quantize,
    quantize,
    round_zero_point,
    sqnr,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=50)
COUNT = 100_000


def _values(scale: Tensor, seed: int = 0) -> Tensor:
    """Values over and beyond the range, a third of them ties: (k + 1/2) * scale in float32."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(COUNT - COUNT // 3, generator=generator) * 60 * scale
    codes = torch.randint(-300, 300, (COUNT // 3,), generator=generator)
    return torch.cat([smooth, (codes + 0.5) * scale])


def _runtime(kind: int, scale: float, zero_point: int, x: np.ndarray) -> list[np.ndarray]:
    """Codes (as int32) and values of ONNX Runtime's QuantizeLinear and DequantizeLinear."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])]
    outputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT32, [None]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [None]),
    ]
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("zero", kind, [], [zero_point]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("none", kind, [], [0]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        helper.make_node("DequantizeLinear", ["q", "one", "none"], ["plain"]),
        helper.make_node("Cast", ["plain"], ["codes"], to=TensorProto.INT32),
    ]
    graph = helper.make_graph(nodes, "quantise", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(["codes", "y"], {"x": x}))


RUNTIME_CASES = [
    (TensorProto.UINT8, Grid(8, False), 131),
    (TensorProto.INT8, Grid(8, True), 0),
    (TensorProto.INT4, Grid(4, True), 0),
    (TensorProto.UINT4, Grid(4, False), 6),
    (TensorProto.UINT16, Grid(16, False), 32771),
]


@pytest.mark.parametrize(("kind", "grid", "zero_point"), RUNTIME_CASES)
@pytest.mark.parametrize("scale", [0.125, 0.3, 1.7e-5, 3.1e4])
def test_equals_onnx_runtime_bit_for_bit(
    kind: int, grid: Grid, zero_point: int, scale: float
) -> None:
    s = torch.tensor(scale)
    z = torch.tensor(float(zero_point))
    x = _values(s)
    codes, y = _runtime(kind, float(s), zero_point, x.numpy())
    assert np.array_equal(quantize(x, s, z, grid).numpy().astype(np.int32), codes)
    assert np.array_equal(fake_quantize(x, s, z, grid).numpy(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_numpy_rint(dtype: torch.dtype) -> None:
    grid = Grid(4, True)
    s = torch.tensor(0.3, dtype=dtype)
    x = _values(torch.tensor(0.3)).to(dtype)
    expected = np.clip(np.rint(x.numpy() / s.numpy()), -8, 7)
    assert np.array_equal(quantize(x, s, None, grid).numpy(), expected)


def test_division_is_true() -> None:
    """A product with the reciprocal would give other codes on near ties."""
    s = torch.tensor(0.3)
    x = _values(s)
    grid = Grid(8, True)
    product = (x * (1 / s)).round().clamp(grid.lowest, grid.highest)
    assert not torch.equal(product, quantize(x, s, None, grid))


@PROPERTY
@given(
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    exponent=st.floats(-30, 30),
    seed=st.integers(0, 999),
    zero=st.floats(0, 1),
)
def test_codes_stay_on_the_grid_and_zero_is_exact(
    bits: int, symmetric: bool, exponent: float, seed: int, zero: float
) -> None:
    grid = Grid(bits, symmetric)
    z = torch.tensor(0.0 if symmetric else float(round(zero * grid.highest)))
    s = torch.tensor(10.0**exponent)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, generator=generator) * s * 2 ** (bits - 1)
    x = torch.cat([x, torch.tensor([0.0, 3e38, -3e38])])
    codes = quantize(x, s, z, grid)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= grid.lowest
    assert float(codes.max()) <= grid.highest
    assert grid.highest - grid.lowest == 2**bits - 1
    y = dequantize(codes, s, z)
    assert float(y[-3]) == 0.0
    assert torch.equal(fake_quantize(x, s, z, grid), y)
    assert torch.equal(quantize(y, s, z, grid), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (_values(torch.tensor(0.05)) / 4).to(dtype)
    s, z, grid = torch.tensor(0.05), torch.tensor(121.0), Grid(8, False)
    codes = quantize(x, s, z, grid)
    assert codes.dtype == dtype
    assert torch.equal(codes.float(), quantize(x.float(), s, z, grid))
    assert torch.equal(fake_quantize(x, s, z, grid), dequantize(codes, s, z))
    with pytest.raises(ValueError, match="cannot hold codes of 16 bits"):
        quantize(x, s, None, Grid(16, True))


def test_integer_codes_dequantize_to_the_dtype_of_the_scale() -> None:
    codes = torch.tensor([0, 130, 255], dtype=torch.uint8)
    y = dequantize(codes, torch.tensor(0.5), torch.tensor(130.0))
    assert torch.equal(y, torch.tensor([-65.0, 0.0, 62.5]))


def test_gradients_by_hand() -> None:
    grid = Grid(4, False)  # codes 0 to 15
    x = torch.tensor([-5.0, 0.3, 1.3, 30.0], requires_grad=True)
    s = torch.tensor(1.0, requires_grad=True)
    z = torch.tensor(3.0, requires_grad=True)
    y = fake_quantize(x, s, z, grid)
    assert torch.equal(y.detach(), torch.tensor([-3.0, 0.0, 1.0, 12.0]))
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    y.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([0.0, 10.0, 100.0, 0.0]))
    # LSQ: code - zero outside, round(v) - v inside; zero-point: -scale outside
    slope = torch.tensor([-3.0, -0.3, -0.3, 12.0])
    torch.testing.assert_close(s.grad, (upstream * slope).sum())
    torch.testing.assert_close(z.grad, torch.tensor(-1001.0))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(1, 4)])
def test_gradients_follow_the_granularity(
    granularity: PerTensor | PerChannel | PerBlock,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, generator=generator, requires_grad=True)
    shape = granularity.scale_shape(x.shape)
    s = torch.full(shape, 0.2, requires_grad=True)
    fake_quantize(x, granularity.expand(s, x.shape), None, Grid(4, True)).pow(2).sum().backward()
    assert s.grad is not None
    assert s.grad.shape == shape
    assert bool((s.grad != 0).all())
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_scale_gradient_is_the_slope_where_nothing_rounds_differently() -> None:
    """Saturated values are linear in the scale, so finite differences must agree."""
    grid = Grid(4, True)
    x = torch.tensor([100.0, -100.0, 50.0], dtype=torch.float64)
    s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scale: fake_quantize(x, scale, None, grid), (s,))


def test_only_asked_for_gradients_are_made() -> None:
    s = torch.tensor(0.2, requires_grad=True)
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    fake_quantize(x, s, None, Grid(4, True)).sum().backward()
    assert s.grad is not None
    assert x.grad is None


def test_zero_point_is_rounded_into_the_grid_and_trained_through() -> None:
    z = torch.tensor([-2.0, 2.5, 7.6, 99.0], requires_grad=True)
    rounded = round_zero_point(z, Grid(4, False))
    assert torch.equal(rounded.detach(), torch.tensor([0.0, 2.0, 8.0, 15.0]))
    rounded.sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, torch.ones(4))


def test_granularity_shapes() -> None:
    shape = (6, 10)
    scale = torch.arange(18.0).view(6, 3)
    block = PerBlock(1, 4)
    assert block.scale_shape(shape) == (6, 3)
    assert PerBlock(0, 4).scale_shape(shape) == (2, 10)
    full = block.expand(scale, shape)
    assert full.shape == shape
    assert torch.equal(full[:, 8:], scale[:, 2:].expand(6, 2))
    assert PerChannel(-1).scale_shape(shape) == (10,)
    assert PerChannel(1).expand(torch.ones(10), shape).shape == (1, 10)
    assert PerTensor().scale_shape(shape) == ()
    with pytest.raises(ValueError, match=r"shape \(6, 3\), got \(6,\)"):
        block.expand(torch.ones(6), shape)
    with pytest.raises(ValueError, match="axis 2 does not exist"):
        PerChannel(2).scale_shape(shape)
    with pytest.raises(ValueError, match="at least one value"):
        PerBlock(0, 0)


def test_sqnr() -> None:
    x = torch.ones(100)
    assert sqnr(x, x * 1.1) == pytest.approx(20.0, abs=1e-5)  # 0.1 of the amplitude, in float32
    assert sqnr(x, x) == float("inf")
    assert sqnr(torch.zeros(3), torch.ones(3)) == -float("inf")
    with pytest.raises(ValueError, match="differ in shape"):
        sqnr(x, x[:3])


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="2 to 16 bits"):
        Grid(1, True)
    with pytest.raises(ValueError, match="floating-point"):
        quantize(torch.zeros(2, dtype=torch.int32), torch.tensor(1.0), None, Grid(4, True))
