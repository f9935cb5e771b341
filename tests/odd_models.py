"""Toys of which something is odd: a block that no pass knows, control flow, custom operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as functional_map
from torch._higher_order_ops.while_loop import while_loop
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from tests.toys import MAX_POSITIONS, RMSNorm, Toy, ToyConfig, make_tokens, make_toy

THREE = ToyConfig(layers=3, hidden=32, mlp=48)
ONE = ToyConfig(layers=1, hidden=32, mlp=48)
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


class Around(nn.Module):
    """A toy of one block, and something odd done to its token ids or logits.

    Attributes:
        steps: a buffer that an odd forward may write.
        scale: batch normalisation of the logits.
    """

    steps: Tensor

    def __init__(self, odd: Odd) -> None:
        super().__init__()
        self.toy, self.odd = make_toy(ONE), odd
        self.register_buffer("steps", torch.zeros(1))
        self.scale = nn.BatchNorm1d(ONE.vocabulary)

    def forward(self, ids: Tensor) -> object:
        return self.odd(self, ids)


Odd = Callable[[Around, Tensor], object]


def condition(model: Around, ids: Tensor) -> object:
    """Twice the logits or three times, by their sum."""
    logits = model.toy(ids)
    return torch.cond(logits.sum() > 0, lambda x: x * 2, lambda x: x * 3, (logits,))


def loop(model: Around, ids: Tensor) -> object:
    """One more until the sum is positive."""
    logits = model.toy(ids)
    return while_loop(lambda x: x.sum() < 0, lambda x: (x + 1.0,), (logits,))[0]


def each(model: Around, ids: Tensor) -> object:
    """A function of every row by itself."""
    return functional_map(lambda x: x * 2, model.toy(ids))


def chosen_by_value(model: Around, ids: Tensor) -> object:
    """As many ones as there are large ids: a size that depends on values."""
    large = (ids > 20).nonzero()
    return model.toy(ids) + torch.ones(large.shape[0]).sum()


def counted(model: Around, ids: Tensor) -> object:
    """The logits, and a step counter that nothing reads."""
    model.steps.add_(1)
    return model.toy(ids)


def counting(model: Around, ids: Tensor) -> object:
    """The logits times the number of runs so far."""
    model.steps.add_(1)
    return model.toy(ids) * model.steps


def normalized(model: Around, ids: Tensor) -> object:
    """Batch normalisation, which in training writes its running mean."""
    return model.scale(model.toy(ids).transpose(1, 2)).transpose(1, 2)


def dropped(model: Around, ids: Tensor) -> object:
    """Attention with a dropout of its own."""
    x = model.toy.model.embed_tokens(ids).unsqueeze(1)
    mixed = functional.scaled_dot_product_attention(
        x, x, x, dropout_p=0.1 if model.training else 0.0, is_causal=True
    )
    return model.toy(ids) + mixed.sum(dim=(1, 3)).unsqueeze(-1)


def complex_logits(model: Around, ids: Tensor) -> object:
    """Logits with an imaginary part."""
    logits = model.toy(ids)
    return torch.complex(logits, logits)


def answers(model: Around, ids: Tensor) -> object:
    """The most probable ids."""
    return model.toy(ids).argmax(-1)


def one_number(model: Around, ids: Tensor) -> object:
    """A number for each sequence."""
    return model.toy(ids).sum((1, 2))


def hidden_first(model: Around, ids: Tensor) -> object:
    """The hidden states, then the logits."""
    return model.toy.model(ids), model.toy(ids)


def with_probabilities(model: Around, ids: Tensor) -> object:
    """The logits, then their softmax."""
    logits = model.toy(ids)
    return {"logits": logits, "probabilities": logits.softmax(-1)}


class Shifted(nn.Module):
    """A toy whose residual stream takes an input of floats, beside the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = make_toy(ONE)

    def forward(self, ids: Tensor, shift: Tensor) -> Tensor:
        return cast(Tensor, self.toy(ids) + shift)


def shared_blocks() -> Toy:
    """ALBERT's way: one block's weights, used twice."""
    toy = make_toy(replace(THREE, attention_bias=True, output_bias=True, mlp_bias=True))
    block = toy.model.layers[0]
    toy.model.layers = nn.ModuleList([block, block])
    return toy
