"""Every map is invertible by construction, and commutes with what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptq_compiler.transforms import (
    Affine,
    Compose,
    DenseBlocks,
    Diagonal,
    Hadamard,
    Identity,
    Kronecker,
    Map,
    RopePairs,
    Rotation,
    random_signs,
    shared_evaluation,
)

EXACT = 1e-12  # float64 rounding (1e-16) times condition numbers of up to a few hundred
PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _base(size: int) -> Tensor:
    return Hadamard(size, random_signs(size, _generator(7))).matrix()


def _rope_pairs(blocks: int) -> RopePairs:
    pairs = torch.tensor([[0, 3], [1, 4]])
    return RopePairs(pairs, torch.tensor([2, 5, 6, 7]), blocks, 8)


MAPS: dict[str, Callable[[int], Map]] = {
    "identity": lambda blocks: Identity(8 * blocks, blocks),
    "diagonal": lambda blocks: Diagonal(8 * blocks, blocks),
    "rotation": lambda blocks: Rotation(8 * blocks, blocks),
    "rotation from a rounded base": lambda blocks: Rotation(8 * blocks, blocks, _base(8).float()),
    "affine": lambda blocks: Affine(blocks, 8),
    "affine from a base": lambda blocks: Affine(blocks, 8, _base(8)),
    "hadamard": lambda blocks: Hadamard(8 * blocks, blocks=blocks),
    "rope pairs": _rope_pairs,
    "kronecker": lambda blocks: Kronecker(Rotation(4 * blocks), Affine(1, 2)),
    "compose": lambda blocks: Compose(Diagonal(8 * blocks, blocks), Affine(blocks, 8)),
    "compose of unlike blocks": lambda blocks: Compose(Rotation(8 * blocks), Affine(blocks, 8)),
}


def _repeated(map: Map, repeat: int) -> Tensor:
    """The dense matrix with each block standing `repeat` times in a row."""
    matrix = map.matrix()
    width = map.block
    blocks = [
        matrix[h * width : (h + 1) * width, h * width : (h + 1) * width] for h in range(map.blocks)
    ]
    return torch.block_diag(*[block for block in blocks for _ in range(repeat)])


@pytest.mark.parametrize("name", MAPS)
@PROPERTY
@given(
    blocks=st.integers(1, 3),
    repeat=st.integers(1, 3),
    seed=st.integers(0, 999),
    strength=st.floats(0.1, 1.0),
)
def test_inverses_are_exact_off_identity(
    name: str, blocks: int, repeat: int, seed: int, strength: float
) -> None:
    map = MAPS[name](blocks)
    generator = _generator(seed)
    map.randomize_(generator, strength)
    x = torch.randn(2, 3, map.size * repeat, dtype=torch.float64, generator=generator)
    dense = _repeated(map, repeat)
    y = map.right(x, repeat)
    assert y.shape == x.shape
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ dense, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(map.right_inverse(y, repeat), x, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(
        map.right_inverse_transpose(x, repeat),
        x @ torch.linalg.inv(dense).mT,
        rtol=1e-10,  # the reference inverts a matrix, the map does not
        atol=1e-10,
    )
    inner = (y * map.right_inverse_transpose(x, repeat)).sum(-1)
    torch.testing.assert_close(inner, x.square().sum(-1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "identity"])
def test_randomize_moves_off_identity_and_strength_zero_does_not(name: str) -> None:
    map = MAPS[name](2)
    before = map.matrix()
    map.randomize_(_generator(), 0.0)
    assert torch.equal(map.matrix(), before)
    map.randomize_(_generator(), 0.7)
    assert float((map.matrix() - before).abs().max()) > 0.05


@pytest.mark.parametrize("name", MAPS)
def test_gradients_reach_every_parameter_and_are_finite(name: str) -> None:
    map = MAPS[name](2)
    generator = _generator(3)
    for strength in (0.0, 0.5):  # at the start, where many maps are at a special point, and off
        map.randomize_(generator, strength)
        map.zero_grad()
        x = torch.randn(5, map.size, generator=generator, requires_grad=True)
        weight = torch.randn(5, map.size, generator=generator)
        y = map.right(x) * weight + map.right_inverse_transpose(x).pow(3)
        y.sum().backward()
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())
        for parameter_name, parameter in map.named_parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, parameter_name
            assert bool(torch.isfinite(parameter.grad).all()), parameter_name
            assert float(parameter.grad.abs().max()) > 0, parameter_name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", MAPS)
def test_every_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    map = MAPS[name](2)
    map.randomize_(_generator(), 0.5)
    x = torch.randn(4, map.size, generator=_generator(1)).to(dtype)
    y = map.right(x)
    assert y.dtype == dtype
    exact = map.right(x.double())
    bound = 8 * torch.finfo(dtype).eps * float(exact.detach().abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=bound)


def test_casting_a_module_does_not_round_its_constants() -> None:
    for map in (Rotation(24, base=_base(24)), Hadamard(172), Affine(2, 12, _base(12))):
        before = map.matrix()
        map.half().float()
        assert torch.equal(map.matrix(), before)
        x = torch.randn(3, map.size, dtype=torch.float64, generator=_generator())
        torch.testing.assert_close(map.right_inverse(map.right(x)), x, rtol=EXACT, atol=EXACT)


def test_rotation_starts_at_its_base_and_stays_orthogonal() -> None:
    base = _base(24)
    rotation = Rotation(24, base=base)
    torch.testing.assert_close(rotation.matrix(), base, rtol=0, atol=EXACT)
    rotation.randomize_(_generator(), 1.0)
    matrix = rotation.matrix()
    one = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.mT, one, rtol=0, atol=EXACT)


def test_shared_evaluation_builds_once_and_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    affine = Affine(2, 8)
    affine.randomize_(_generator(), 0.5)
    x = torch.randn(4, 16, generator=_generator(1))

    def loss() -> Tensor:
        return (affine.right(x) - affine.right_inverse_transpose(x)).pow(2).sum()

    loss().backward()
    alone = [
        parameter.grad.clone() for parameter in affine.parameters() if parameter.grad is not None
    ]
    affine.zero_grad()
    calls = []
    build = Rotation._build

    def counted(self: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        calls.append(dtype)
        return build(self, dtype)

    monkeypatch.setattr(Rotation, "_build", counted)
    with shared_evaluation(affine):
        loss().backward()
    assert len(calls) == 2  # U and V
    for parameter, gradient in zip(affine.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(not item._shared for item in affine.modules() if isinstance(item, DenseBlocks))


def test_token_mixing_commutes_with_affine() -> None:
    affine = Affine(2, 4)
    affine.randomize_(_generator(), 0.7)
    tokens = torch.randn(5, 5, dtype=torch.float64, generator=_generator(1))
    x = torch.randn(5, 8, dtype=torch.float64, generator=_generator(2))
    mixed = affine.right(tokens @ x)
    torch.testing.assert_close(mixed, tokens @ affine.right(x), rtol=EXACT, atol=EXACT)


def test_gate_product_commutes_with_diagonal_only() -> None:
    gate = torch.randn(5, 8, dtype=torch.float64, generator=_generator(1))
    x = torch.randn(5, 8, dtype=torch.float64, generator=_generator(2))
    for map, commutes in ((Diagonal(8), True), (Rotation(8), False)):
        map.randomize_(_generator(), 0.7)
        difference = float((map.right(gate * x) - gate * map.right(x)).detach().abs().max())
        assert (difference < EXACT) is commutes


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"acts on 16 channels, got 8"):
        Diagonal(8).right(torch.zeros(2, 8), repeat=2)
    with pytest.raises(ValueError, match="repeat must be at least 1"):
        Diagonal(8).right(torch.zeros(2, 8), repeat=0)
    with pytest.raises(ValueError, match="floating-point"):
        Diagonal(8).right(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="divisible by blocks"):
        Diagonal(8, 3)
    with pytest.raises(ValueError, match="must be orthogonal"):
        Rotation(4, base=2 * torch.eye(4))
    with pytest.raises(ValueError, match=r"base must be \(4, 4\)"):
        Rotation(4, base=torch.eye(3))
    with pytest.raises(ValueError, match="one size"):
        Compose(Diagonal(8), Diagonal(4))
    with pytest.raises(ValueError, match="numbers ±1"):
        Hadamard(4, torch.zeros(4))
