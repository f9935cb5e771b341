"""One map after another."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fptq_compiler.transforms.map import Map


class Compose(Map):
    """M = M1 M2 ...: x goes through the first map first.

    Has as many blocks as its maps if they agree, else one.
    """

    def __init__(self, *maps: Map) -> None:
        """Compose maps of one size.

        Raises:
            ValueError: there is no map, or their sizes differ.
        """
        sizes = {item.size for item in maps}
        if len(sizes) != 1:
            message = f"compose needs maps of one size, got {sorted(sizes)}"
            raise ValueError(message)
        blocks = {item.blocks for item in maps}
        super().__init__(sizes.pop(), blocks.pop() if len(blocks) == 1 else 1)
        self.maps = nn.ModuleList(maps)
        self.commutes_with = " and ".join(dict.fromkeys(item.commutes_with for item in maps))

    @property
    def parts(self) -> tuple[Map, ...]:
        """The maps, the first applied first."""
        return tuple(cast(Map, item) for item in self.maps)

    def _multiply(self, x: Tensor) -> Tensor:
        flat, repeat = self._flat(x)
        for item in self.parts:
            flat = item.right(flat, repeat)
        return flat.reshape(x.shape)

    def _multiply_inverse(self, x: Tensor) -> Tensor:
        flat, repeat = self._flat(x)
        for item in reversed(self.parts):
            flat = item.right_inverse(flat, repeat)
        return flat.reshape(x.shape)

    def _multiply_inverse_transpose(self, x: Tensor) -> Tensor:
        flat, repeat = self._flat(x)
        for item in self.parts:
            flat = item.right_inverse_transpose(flat, repeat)
        return flat.reshape(x.shape)

    def _flat(self, x: Tensor) -> tuple[Tensor, int]:
        rows, blocks, repeat, block = x.shape
        if blocks == 1:
            return x.reshape(rows * repeat, block), 1
        return x.reshape(rows, blocks * repeat * block), repeat

    def randomize_(self, generator: torch.Generator, strength: float) -> None:
        """Randomise each map in turn."""
        for item in self.parts:
            item.randomize_(generator, strength)

    def describe(self) -> str:
        """Each map in turn."""
        return ", then ".join(item.describe() for item in self.parts)
