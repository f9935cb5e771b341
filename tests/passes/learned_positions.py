"""A toy with a learned table of positions, in several spellings."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.graph.program import Program
from fptq_compiler.passes import FIND_SITES
from tests.passes.cached_runs import NO_ROPE
from tests.passes.steps import ONE, exported_module
from tests.toys import MAX_POSITIONS, make_tokens, make_toy


class Learned(nn.Module):
    """A toy with a table of positions at the embedding, as GPT-2 has."""

    def __init__(self, spelling: str = "default") -> None:
        super().__init__()
        self.toy, self.spelling = make_toy(NO_ROPE), spelling
        generator = torch.Generator().manual_seed(9)
        table = torch.randn(MAX_POSITIONS, NO_ROPE.hidden, generator=generator)
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder = self.toy.model
        x, length = decoder.embed_tokens(input_ids), input_ids.shape[1]
        if self.spelling == "default":
            x = x + functional.embedding(torch.arange(length), self.table)
        elif self.spelling == "start":
            x = x + functional.embedding(torch.arange(0, length), self.table)
        elif self.spelling == "count":
            x = x + functional.embedding(torch.arange(2 * length)[::2], self.table)
        elif self.spelling == "offset":  # OPT
            counted = torch.ones_like(input_ids).cumsum(1)
            x = x + functional.embedding(counted + 1, self.table)
        elif self.spelling == "indexed":
            x = x + self.table[torch.ones(length, dtype=torch.int64).cumsum(0)]
        else:
            x = x + self.table[:length]
        for layer in decoder.layers:
            x = layer(x, ())
        return cast(Tensor, self.toy.lm_head(decoder.norm(x)))


def learned(spelling: str) -> Program:
    return exported_module(Learned(spelling), make_tokens(ONE, 2, 7), *FIND_SITES)
