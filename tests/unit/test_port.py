"""A merged weight computes the same function, compared with explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fptq_compiler.transforms import Affine, Diagonal, Map, Port, Rotation, Side, apply

EXACT = 1e-12
KV_HEADS, HEAD_DIM, GROUP = 2, 4, 3


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _affine(blocks: int = KV_HEADS) -> Map:
    map = Affine(blocks, HEAD_DIM)
    map.randomize_(torch.Generator().manual_seed(9), 0.7)
    return map.requires_grad_(False)


def _dense(map: Map, inverse_transpose: bool, repeat: int = 1) -> Tensor:
    """What the activation sees, with each block repeated."""
    matrix = map.matrix()
    matrix = torch.linalg.inv(matrix).mT if inverse_transpose else matrix
    width = map.block
    diagonal = [
        matrix[h * width : (h + 1) * width, h * width : (h + 1) * width] for h in range(map.blocks)
    ]
    return torch.block_diag(*[block for block in diagonal for _ in range(repeat)])


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)
    assert actual.is_contiguous()


@pytest.mark.parametrize("inverse_transpose", [False, True])
@pytest.mark.parametrize("repeat", [1, GROUP])
def test_each_side_against_explicit_matrices(inverse_transpose: bool, repeat: int) -> None:
    map = _affine()
    M = _dense(map, inverse_transpose, repeat)
    n = map.size * repeat
    x, weight, bias = _random(5, 7), _random(n, 7, seed=1), _random(n, seed=2)
    out = Port("w", Side.OUT, inverse_transpose, repeat)
    moved = linear(x, apply(map, out, weight), apply(map, out, bias))
    _close(moved, linear(x, weight, bias) @ M)
    reader, y = _random(6, n, seed=3), _random(5, n, seed=4)
    merged = apply(map, Port("w", Side.IN, inverse_transpose, repeat), reader)
    torch.testing.assert_close(linear(y @ M, merged), linear(y, reader), rtol=1e-11, atol=1e-11)
    assert merged.is_contiguous()
    table = _random(11, n, seed=5)
    _close(apply(map, Port("w", Side.TABLE, inverse_transpose, repeat), table), table @ M)


@pytest.mark.parametrize("side", list(Side))
def test_range_of_a_packed_weight(side: Side) -> None:
    map = _affine()
    start, stop = 5, 5 + map.size * GROUP
    weight = _random(40, 40)
    port = Port("packed", side, True, GROUP, start, stop)
    merged = apply(map, port, weight)
    axis = 0 if side is Side.OUT else 1
    expected = weight.clone()
    inner = weight.narrow(axis, start, stop - start).contiguous()
    whole = apply(map, Port("part", side, True, GROUP), inner)
    expected.narrow(axis, start, stop - start).copy_(whole)
    assert torch.equal(merged, expected)
    if side is Side.OUT:
        bias = _random(40, seed=1)
        moved = apply(map, port, bias)
        assert torch.equal(moved[:start], bias[:start])
        assert torch.equal(moved[stop:], bias[stop:])
        _close(moved[start:stop], bias[start:stop] @ _dense(map, True, GROUP))


def test_value_site_with_shared_heads_is_preserved() -> None:
    map = _affine()
    x, mixing = _random(6, 10), torch.softmax(_random(6, 6, seed=1), dim=-1)
    v, v_bias = _random(map.size, 10, seed=2), _random(map.size, seed=3)
    o = _random(10, map.size * GROUP, seed=4)

    def attend(v: Tensor, v_bias: Tensor, o: Tensor) -> Tensor:
        heads = linear(x, v, v_bias).view(6, KV_HEADS, HEAD_DIM)
        wide = heads.repeat_interleave(GROUP, dim=1).reshape(6, -1)
        return linear(mixing @ wide, o)

    out = Port("v", Side.OUT, False)
    moved = attend(
        apply(map, out, v),
        apply(map, out, v_bias),
        apply(map, Port("o", Side.IN, False, GROUP), o),
    )
    torch.testing.assert_close(moved, attend(v, v_bias, o), rtol=1e-11, atol=1e-11)


def test_up_down_site_is_preserved() -> None:
    map = Diagonal(12)
    map.randomize_(torch.Generator().manual_seed(1), 0.7)
    x, gate, up, down = _random(5, 8), _random(12, 8), _random(12, 8, seed=1), _random(8, 12)
    reference = linear(linear(x, gate).sigmoid() * linear(x, up), down)
    merged_up = apply(map, Port("up", Side.OUT, False), up)
    merged_down = apply(map, Port("down", Side.IN, False), down)
    moved = linear(linear(x, gate).sigmoid() * linear(x, merged_up), merged_down)
    torch.testing.assert_close(moved, reference, rtol=EXACT, atol=EXACT)


def test_residual_site_is_preserved() -> None:
    map = Rotation(8)
    map.randomize_(torch.Generator().manual_seed(1), 0.7)
    table, reader, writer = _random(20, 8), _random(12, 8, seed=1), _random(8, 12, seed=2)
    head = _random(20, 8, seed=3)

    def model(table: Tensor, reader: Tensor, writer: Tensor, head: Tensor) -> Tensor:
        x = table
        x = x + linear(linear(x / x.norm(dim=-1, keepdim=True), reader).relu(), writer)
        return linear(x, head)

    moved = model(
        apply(map, Port("embedding", Side.TABLE, False), table),
        apply(map, Port("reader", Side.IN, False), reader),
        apply(map, Port("writer", Side.OUT, False), writer),
        apply(map, Port("head", Side.IN, False), head),
    )
    reference = model(table, reader, writer, head)
    torch.testing.assert_close(moved, reference, rtol=EXACT, atol=EXACT)


def test_gradients_reach_weight_and_map() -> None:
    map = Affine(KV_HEADS, HEAD_DIM)
    weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    merged = apply(map, Port("w", Side.OUT, True, start=4, stop=12), weight)
    merged.pow(4).sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.abs().min() > 0)
    assert map.sigma.grad is not None
    assert bool(map.sigma.grad.abs().min() > 0)


def test_misfits_are_refused_by_name() -> None:
    map = Diagonal(8)
    with pytest.raises(ValueError, match=r"layers\.0\.v, side out: .*acts on 8 .*got 6"):
        apply(map, Port("layers.0.v", Side.OUT, False), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="side in takes rank"):
        apply(map, Port("bias", Side.IN, False), torch.zeros(8))
    with pytest.raises(ValueError, match="range 4:12 is not inside 8"):
        apply(map, Port("w", Side.OUT, False, start=4, stop=12), torch.zeros(8, 4))
