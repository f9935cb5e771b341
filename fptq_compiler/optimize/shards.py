"""Frozen weights that every rank holds a part of, for models larger than one device.

FSDP2 gathers the weights of a block in front of its forward pass, and again in front of its
backward pass, and lets them go behind it. The parameters of the program hold nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.fx import Node

from fptq_compiler.graph.evaluate import Environment, attribute, held
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import StoredParameter

Run = Callable[[Environment], Environment]


def frozen_matrices(program: Program, trained: Collection[Tensor]) -> dict[Node, nn.Parameter]:
    """What is worth sharding: matrices that do not change, by the nodes that read them.

    Args:
        program: not changed.
        trained: the parameters that change.
    """
    changing = {id(p) for p in trained}
    values = {
        n: held(program.module, str(n.target)) for n in program.graph.nodes if n.op == "get_attr"
    }
    return {
        n: value for n, value in values.items()
        if isinstance(value, nn.Parameter) and value.dim() >= 2 and id(value) not in changing
    }


class Shards(nn.Module):
    """This rank's part of the frozen matrices of one block."""

    def __init__(self, program: Program, nodes: Iterable[Node]) -> None:
        """Keep this rank's part of what the nodes read."""
        super().__init__()
        self.nodes = tuple(nodes)
        self.weights = nn.ParameterList(
            nn.Parameter(attribute(program.module, str(n.target)).detach(), False)
            for n in self.nodes
        )
        mesh = init_device_mesh(program.device.type, (dist.get_world_size(),))
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    def forward(self, run: Run, values: Environment) -> Environment:
        """Run the block on the values that enter it and on its weights, which are whole now."""
        return run({**values, **dict(zip(self.nodes, self.weights, strict=True))})


def release(matrices: Iterable[nn.Parameter]) -> None:
    """Free the memory of parameters that shards stand for; what lies in files has none."""
    for parameter in matrices:
        if not isinstance(parameter, StoredParameter):
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def restore(matrices: dict[Node, nn.Parameter], shards: Iterable[Shards]) -> None:
    """Give the parameters their values again, gathered from all ranks."""
    for part in shards:
        for node, weight in zip(part.nodes, part.weights, strict=True):
            assert isinstance(weight, DTensor)
            if not isinstance(matrices[node], StoredParameter):
                matrices[node].data = weight.full_tensor()
