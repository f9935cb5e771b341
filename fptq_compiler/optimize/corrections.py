"""Trained corrections of the weights, in front of their quantisers (as L4Q, arXiv 2402.04902).

A correction stands behind all transforms of a weight, so it is added to what is rounded, and it
is merged with them.
"""

from __future__ import annotations

import torch

from fptq_compiler.graph.edges import DeltaEdge, Edge, LowRankEdge, insert_edge
from fptq_compiler.graph.program import Program


def insert_corrections(program: Program, kind: str, *, rank: int, seed: int) -> None:
    """Give the weight of every quantised linear a correction, zero at first.

    Args:
        program: with quantisers; rewritten in place.
        kind: "lora", "full", or "none".
        rank: of "lora".
        seed: of what "lora" draws.
    """
    if kind == "none":
        return
    generator = torch.Generator().manual_seed(seed)
    for record in program.weight_quantizers:
        if record.role == "linear":
            shape = program.held(record.parameter).shape
            low_rank = kind == "lora"
            edge: Edge = LowRankEdge(shape, rank, generator) if low_rank else DeltaEdge(shape)
            path = f"edges.correction.{record.parameter.replace('.', '_')}"
            insert_edge(program, path, record.parameter, edge.to(program.device))
