"""How many values share one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """One scale for all: scale ()."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scale of a tensor of this shape."""
        return ()

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """The scale as it broadcasts to a tensor of this shape."""
        _check_scale(scale, self.scale_shape(shape))
        return scale


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of an axis: for (n0, .., nk) the scale is (n_axis,)."""

    axis: int

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scale of a tensor of this shape.

        Raises:
            ValueError: the tensor has no such axis.
        """
        return (shape[_axis(self.axis, shape)],)

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """The scale as it broadcasts to a tensor of this shape: (1, .., n_axis, .., 1).

        Raises:
            ValueError: the scale has not the shape of `scale_shape`.
        """
        _check_scale(scale, self.scale_shape(shape))
        view = [1] * len(shape)
        view[_axis(self.axis, shape)] = -1
        return scale.view(view)


@dataclass(frozen=True)
class PerBlock:
    """One scale per run of `size` values along an axis, the last run may be shorter.

    For (n0, .., nk) the scale is (n0, .., ceil(n_axis / size), .., nk): one per block and per
    index of every other axis, as ONNX block quantisation has it.
    """

    axis: int
    size: int

    def __post_init__(self) -> None:
        """Check the size.

        Raises:
            ValueError: the size is not positive.
        """
        if self.size < 1:
            message = f"a block has at least one value, got size {self.size}"
            raise ValueError(message)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scale of a tensor of this shape.

        Raises:
            ValueError: the tensor has no such axis.
        """
        axis = _axis(self.axis, shape)
        blocks = -(-shape[axis] // self.size)
        return (*shape[:axis], blocks, *shape[axis + 1 :])

    def expand(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """The scale repeated to the full shape of the tensor.

        Raises:
            ValueError: the scale has not the shape of `scale_shape`.
        """
        _check_scale(scale, self.scale_shape(shape))
        axis = _axis(self.axis, shape)
        return scale.repeat_interleave(self.size, dim=axis).narrow(axis, 0, shape[axis])


Granularity = PerTensor | PerChannel | PerBlock


def _axis(axis: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= axis < len(shape):
        message = f"axis {axis} does not exist in a tensor of shape {tuple(shape)}"
        raise ValueError(message)
    return axis % len(shape)


def _check_scale(scale: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(scale.shape) != expected:
        message = f"the scale must have shape {expected}, got {tuple(scale.shape)}"
        raise ValueError(message)
