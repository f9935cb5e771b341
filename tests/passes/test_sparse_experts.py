"""Experts that see the tokens they were chosen for, as many as that may be: each is an MLP."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.recipe import TRANSFORMS
from tests.passes.steps import EXACT, ONE, edited, logits, run
from tests.toys import MLP, Layer, Toy, ToyConfig

EXPERTS = 3


class Sparse(nn.Module):
    """The two best of three MLPs, each on the tokens that chose it: LitGPT's mixture."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden, EXPERTS, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        shares, chosen = functional.softmax(self.router(tokens), -1).topk(2, -1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            torch._check(row.shape[0] >= 0)
            added = expert(tokens[row]) * shares[row, place].unsqueeze(-1)
            out = out.index_add(0, row, added)
        return out.reshape(x.shape)


def _program() -> Program:
    def edit(toy: Toy) -> None:
        mixture = Sparse(ONE)
        generator = torch.Generator().manual_seed(6)
        for parameter in mixture.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.data = value / parameter.shape[-1] ** 0.5
        layer = cast(Layer, toy.model.layers[0])
        layer.mlp = mixture.requires_grad_(False)  # type: ignore[assignment]

    return edited(ONE, edit, *FIND_SITES)


def test_sites() -> None:
    program = _program()
    assert [s.name for s in program.sites.mlp] == [
        f"model.layers.0.mlp.experts.{number}" for number in range(EXPERTS)
    ]
    assert [r.weight for r in program.sites.routers] == ["model.layers.0.mlp.router.weight"]
    site = program.sites.residual
    assert site is not None
    assert site.refused == {}
    assert program.near_misses == []


def test_every_transform_holds() -> None:
    program = _program()
    expected = logits(program)
    for step in insertion(TRANSFORMS, seed=0, scaling_places=("down_proj", "o_proj")):
        run(program, step)
    assert program.scaled
    kinds = [name.partition(".")[0] for name in program.maps]
    assert (kinds.count("updown"), kinds.count("hadamard")) == (EXPERTS, EXPERTS)
    assert relative_error(logits(program), expected) < EXACT
