"""The last linear of a program as a function of tokens: its logits need not exist at once."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fptq_compiler.graph.blocks import logits_node
from fptq_compiler.graph.evaluate import Environment, Watcher, attribute
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.block_function import BlockFunction
from fptq_compiler.optimize.token_parts import Logits


class LastLinear:
    """Logits from what leaves the blocks in front of them."""

    def __init__(self, program: Program, block: BlockFunction) -> None:
        """Take the block `logits` of `outline_with_logits`."""
        self._module = program.module
        self._block = block
        self._logits = logits_node(program)
        self._tokens, *self._shared = block.entering or [self._logits]

    def __call__(self, values: Environment, watch: Watcher | None = None) -> Logits:
        """The logits, float32, not yet computed; `watch` sees every node and its value."""
        shared = tuple(
            values[n] if n in values else attribute(self._module, str(n.target))
            for n in self._shared
        )
        return Logits(values[self._tokens], shared, partial(self._of, watch))

    def _of(self, watch: Watcher | None, tokens: Tensor, *shared: Tensor) -> Tensor:
        entering = zip((self._tokens, *self._shared), (tokens, *shared), strict=True)
        logits: Tensor = self._block(dict(entering), watch)[self._logits]
        return logits.float()
