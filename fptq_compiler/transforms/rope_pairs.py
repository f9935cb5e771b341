"""The largest map that commutes with RoPE: T_k of arXiv 2506.04985."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor, nn

from fptq_compiler.transforms.affine import Affine
from fptq_compiler.transforms.map import Map, normal_


class RopePairs(Map):
    """Per key/value head and RoPE pair (a, b) a rotation and a positive scale.

    (x_a, x_b) -> s (x_a, x_b) R(φ) with R = [[cos φ, sin φ], [-sin φ, cos φ]]. Planar rotations
    commute with RoPE's, so with keys taking M and queries M⁻ᵀ = s⁻¹ R(φ) no logit changes. A
    reflection, or two scales inside a pair, would not commute. Channels which RoPE passes by take
    any invertible map.

    Attributes:
        angle: (blocks, P), radians.
        log_scale: (blocks, P), natural logarithm of s.
        passed: the map of the R channels that are not rotated, or None.
    """

    commutes_with = "RoPE rotations of its pairs"
    pairs: Tensor
    order: Tensor
    back: Tensor

    def __init__(self, pairs: Tensor, passthrough: Tensor, blocks: int, head_dim: int) -> None:
        """Start at the identity.

        Args:
            pairs: (P, 2) integers, the channels of each RoPE pair inside a head.
            passthrough: (R,) integers, the channels that RoPE leaves alone.
            blocks: key/value heads.
            head_dim: channels of a head, 2 P + R.

        Raises:
            ValueError: pairs and passthrough are not each channel exactly once.
        """
        super().__init__(blocks * head_dim, blocks)
        count = pairs.shape[0]
        order = torch.cat([pairs.reshape(count, 2).T.reshape(-1), passthrough.reshape(-1)]).long()
        if order.sort().values.tolist() != list(range(head_dim)):
            message = (
                f"pairs and passthrough must name each of the {head_dim} channels once, "
                f"got {order.tolist()}"
            )
            raise ValueError(message)
        self.register_buffer("pairs", pairs.reshape(count, 2).long())
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.angle = nn.Parameter(torch.zeros(blocks, count))
        self.log_scale = nn.Parameter(torch.zeros(blocks, count))
        rest = head_dim - 2 * count
        self.passed = Affine(blocks, rest) if rest else None

    def _turn(self, x: Tensor, turn: int, stretch: int) -> tuple[Tensor, Tensor]:
        """Pairs times s^stretch R(turn φ), and the untouched channels."""
        count = self.angle.shape[1]
        first, second, rest = torch.split(
            x[..., self.order], [count, count, self.block - 2 * count], dim=-1
        )
        scale = (stretch * self.log_scale.to(x.dtype)).exp()
        angle = turn * self.angle.to(x.dtype)
        cos, sin = (scale * angle.cos())[:, None], (scale * angle.sin())[:, None]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1), rest

    def _join(self, turned: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([turned, rest], dim=-1)[..., self.back]

    def _multiply(self, x: Tensor) -> Tensor:
        turned, rest = self._turn(x, 1, 1)
        return self._join(turned, rest if self.passed is None else self.passed._multiply(rest))

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        turned, rest = self._turn(x, -1, -1)
        return self._join(
            turned, rest if self.passed is None else self.passed._multiply_inverse(rest)
        )

    def _multiply_inverse_transpose(self, x: Tensor) -> Tensor:
        turned, rest = self._turn(x, 1, -1)
        return self._join(
            turned, rest if self.passed is None else self.passed._multiply_inverse_transpose(rest)
        )

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Draw angles from N(0, (π strength)²) and log-scales from N(0, (strength / 2)²)."""
        super().randomize_(generator, strength)
        normal_(self.angle, generator, pi * strength)
        normal_(self.log_scale, generator, strength / 2)
