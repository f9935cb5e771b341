"""How a model is refused that cannot be given a cache."""

from __future__ import annotations

from typing import NoReturn

from torch.fx import Node

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.program import source_line


def refuse_cache(node: Node, reason: str) -> NoReturn:
    """Raise UnsupportedModelError, naming the node, the reason and the user's line."""
    source = source_line(node)
    message = (
        f"--kv-cache: attention at {node.name} cannot be given a cache: {reason}"
        f"{f' ({source})' if source else ''}. Compile without --kv-cache."
    )
    raise UnsupportedModelError(message)
