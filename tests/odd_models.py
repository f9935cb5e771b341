"""Toys of which something is odd: a block that no pass knows, control flow, custom operators."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tests.toys import MAX_POSITIONS, RMSNorm, Toy, ToyConfig, make_tokens, make_toy

THREE = ToyConfig(layers=3, hidden=32, mlp=48)
UNKNOWN = "model.layers.1"
"""The block between two known ones."""


class Averaging(nn.Module):
    """x + W mean of norm(x) up to here: neither attention nor an MLP."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden)
        self.mix = nn.Linear(config.hidden, config.hidden, bias=False)
        nn.init.constant_(self.norm.weight, 1.5)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(-1)
        return cast(Tensor, x + self.mix(self.norm(x).cumsum(1) / count))


def half_known() -> Toy:
    """A decoder of three blocks, the middle one an average over the past."""
    toy = make_toy(THREE)
    torch.manual_seed(0)
    toy.model.layers[1] = Averaging(THREE)
    return toy.eval().requires_grad_(False)


def export_odd(module: nn.Module, config: ToyConfig = THREE) -> ExportedProgram:
    """Export any module of token ids with dynamic batch and sequence."""
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=MAX_POSITIONS)}
    example = (make_tokens(config, 2, 7),)
    return torch.export.export(module, example, dynamic_shapes=(sizes,), strict=False)
