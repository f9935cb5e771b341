"""Run a program with a KV cache in float64: all tokens at once, or some at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.pipeline import Pass, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from tests import toys
from tests.passes.steps import ONE, edited, with_sites
from tests.toys import ToyConfig

CACHE = AddCache(40)
TABLES = 1e-6
"""Relative, on float64 logits: the tables of angles are float32, 6e-8 off; it shows as 4e-8 at
most, and a wrong rewrite as 1e-2 and more."""
VISIBLE = 1e-2
"""Relative: the least that leaving out one of the things tested here moves the logits."""
NO_ROPE = ToyConfig(layers=1, rope="none")
IDS = torch.randint(ToyConfig.vocabulary, (2, 11), generator=torch.Generator().manual_seed(5))
CHANNELS = pytest.mark.parametrize("channels", [False, True], ids=["per-tensor", "per-channel"])
Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def whole(program: Program, ids: Tensor = IDS) -> Tensor:
    """Float64 logits of the graph without a cache."""
    with torch.no_grad():
        return evaluate.logits(program.module, [ids], torch.float64)


def empty(program: Program, batch: int = 2) -> list[Tensor]:
    """Past keys and values of no tokens."""
    return [
        torch.zeros((batch, int(s.dims[1]), 0, int(s.dims[3])), dtype=s.dtype)
        for s in program.inputs[2:]
    ]


def step(program: Program, ids: Tensor, mask: Tensor, past: list[Tensor]) -> list[Tensor]:
    """Float64 logits, and present keys and values."""
    with torch.no_grad():
        return list(evaluate.run(program.module, [ids, mask, *past], dtype=torch.float64))


def decoded(program: Program, ids: Tensor = IDS, chunk: int = 1) -> Tensor:
    """Float64 logits from an empty cache, some tokens at a time."""
    past, found = empty(program, ids.shape[0]), []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        mask = torch.ones(ids.shape[0], start + part.shape[1], dtype=torch.int64)
        logits, *past = step(program, part, mask, past)
        found.append(logits)
    return torch.cat(found, 1)


def frozen(
    config: ToyConfig, bits: int, *steps: Pass, symmetric: bool = True, channels: bool = False
) -> Program:
    """The toy with keys and values quantised, frozen in steps around an eighth or a half."""
    place = PlaceQuantizers(
        weights=16, activations=16, cache=bits, block=0, embedding_bits=16, head_bits=16,
        stored_cache=symmetric, channel_scales=channels,
    )
    program = with_sites(config, place, *steps)
    freeze(program, 0.5 if bits == 4 else 0.125)
    return program


def freeze(program: Program, scale: float) -> None:
    for record in program.activation_quantizers:
        module: Any = program.module.get_submodule(record.module)
        # A scale of its own for each, so that exchanging two of them shows.
        size = torch.tensor(scale * 1.25 if record.role == "value" else scale)
        if module.scale.dim():
            size = size * torch.linspace(0.5, 1.5, module.scale.numel()).view_as(module.scale)
        module.set_range(size, module.zero_point)
    program.facts |= {"calibrated", "folded"}
    run_passes(program, (FreezeQuantizers(),))


def attending(monkeypatch: pytest.MonkeyPatch, attend: Attend, config: ToyConfig = ONE
              ) -> Program:
    """The toy with another attention core."""
    monkeypatch.setattr(toys.Attention, "attend", attend)
    return edited(config, lambda _: None, *FIND_SITES)
