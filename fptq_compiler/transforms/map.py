"""The base of all transforms: an invertible linear map on the channels of an activation.

Activations are row vectors, so a map M acts as x -> x M. A map is made of `blocks` equal
diagonal blocks (one per key/value head where heads matter). Parameters are float32; a call with
a float64 input evaluates everything (exponentials, Cayley solves) in float64, so that a fold in
float64 is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Map(nn.Module):
    """An invertible linear map M on the last axis: x -> x M.

    Subclasses implement `_multiply`, `_multiply_inverse` and `_multiply_inverse_transpose` on a
    split input of shape (rows, blocks, repeat, size / blocks).

    Attributes:
        size: channels that the map acts on, n = blocks * block.
        blocks: number of equal diagonal blocks.
        commutes_with: in words, what the map commutes with; the reason why it may be inserted.
    """

    size: int
    blocks: int
    commutes_with: str = "nothing but linear layers"
    exact_buffers: tuple[str, ...] = ()
    """Names of float64 constants which a cast of the module must not round."""

    def __init__(self, size: int, blocks: int = 1) -> None:
        super().__init__()
        if size < 1 or blocks < 1 or size % blocks:
            message = f"a map needs size >= 1 divisible by blocks, got {size=} and {blocks=}"
            raise ValueError(message)
        self.size = size
        self.blocks = blocks

    @property
    def block(self) -> int:
        """Channels of one diagonal block."""
        return self.size // self.blocks

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        """The same as `right`."""
        return self.right(x, repeat)

    def right(self, x: Tensor, repeat: int = 1) -> Tensor:
        """The product x M.

        Args:
            x: (..., size * repeat), any floating dtype.
            repeat: how many consecutive chunks share one block (query heads per key/value head):
                block h acts on the chunks h * repeat to h * repeat + repeat - 1.

        Returns:
            (..., size * repeat) in the dtype of x.

        Raises:
            ValueError: the last axis is not size * repeat.
        """
        return self._on_blocks(self._multiply, x, repeat)

    def right_inverse(self, x: Tensor, repeat: int = 1) -> Tensor:
        """The product x M⁻¹; arguments and errors as for `right`."""
        return self._on_blocks(self._multiply_inverse, x, repeat)

    def right_inverse_transpose(self, x: Tensor, repeat: int = 1) -> Tensor:
        """The product x M⁻ᵀ; arguments and errors as for `right`."""
        return self._on_blocks(self._multiply_inverse_transpose, x, repeat)

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train."""
        return next(self.parameters(), None) is not None

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """M as a dense (size, size) float64 matrix, for tests and reports."""
        return self.right(torch.eye(self.size, dtype=torch.float64, device=self._device()))

    def describe(self) -> str:
        """One phrase for reports."""
        of = f"{self.blocks} x {self.block}" if self.blocks > 1 else f"{self.size}"
        return f"{type(self).__name__} {of}"

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Move every parameter off the identity, for verification.

        Args:
            generator: the source of randomness.
            strength: 0 changes nothing; about 1 moves log-scales and angles by about one.
        """
        for child in self.children():
            if isinstance(child, Map):
                child.randomize_(generator, strength)

    def _multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _multiply_inverse_transpose(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _on_blocks(self, multiply: Callable[[Tensor], Tensor], x: Tensor, repeat: int) -> Tensor:
        check_length(self, x.shape[-1] if x.ndim else 0, repeat)
        computed = x.to(compute_dtype(x.dtype))
        split = computed.reshape(-1, self.blocks, repeat, self.block)
        return multiply(split).reshape(x.shape).to(x.dtype)

    def _device(self) -> torch.device | None:
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a map is evaluated: float64 for float64, else float32.

    Raises:
        ValueError: the dtype is not a floating one.
    """
    if not dtype.is_floating_point:
        message = f"maps act on floating-point tensors, got {dtype}"
        raise ValueError(message)
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_length(map: Map, length: int, repeat: int) -> None:
    """Check that `length` channels are what the map with this repeat acts on.

    Raises:
        ValueError: they are not.
    """
    if repeat < 1:
        message = f"repeat must be at least 1, got {repeat}"
        raise ValueError(message)
    if length != map.size * repeat:
        message = (
            f"{map.describe()} with repeat {repeat} acts on {map.size * repeat} channels, "
            f"got {length}"
        )
        raise ValueError(message)


def normal_(parameter: Tensor, generator: torch.Generator, deviation: float) -> None:
    """Fill in place from N(0, deviation²), drawn on the generator's device."""
    drawn = torch.randn(parameter.shape, generator=generator, device=generator.device)
    parameter.copy_(drawn * deviation)
