"""Prove by running that a graph with a cache computes what it computed without one.

Four runs on random tokens: the whole sequence, the sequence in two chunks, and a batch whose
rows are padded on the left and on the right. Quantisers of activations pass everything on in these
runs, before and after: a code that flips at a tie would hide, or look like, a wrong rewrite. What
a cache stores is multiplied by its scales instead, so that one at another channel shows.
The static factor of the first token cancels in them; that it follows the mask is for its own test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fptq_compiler.errors import UnsupportedModelError, VerificationError
from fptq_compiler.graph import cache_ops, ops
from fptq_compiler.graph.evaluate import (
    Environment,
    arguments,
    bind_inputs,
    last_uses,
    run_node,
)
from fptq_compiler.graph.program import Program

TOKENS = 11
FIRST = 4  # tokens of the first chunk
PADDING = 3
TOLERANCE = 1e-4  # of the largest logit; float32 tables of angles differ by 1e-7, a wrong
# position moves the logits by 1e-2 and more
BITS = 13  # which argument of cached_attention


@dataclass(frozen=True)
class Proof:
    """Tokens, and the logits that the graph gave for them before the rewrite."""

    ids: Tensor
    logits: Tensor

    @classmethod
    def of(cls, program: Program) -> Proof:
        """Run the graph without a cache."""
        table = next(
            (n for n in program.graph.nodes if n.target in (ops.embedding, _EMBEDDING)), None
        )
        rows = 2
        if table is not None:
            stored = table.args[1] if table.target is ops.embedding else table.args[0]
            rows = program.held(str(stored.target)).shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(rows, (2, TOKENS), generator=generator).to(program.device)
        return cls(ids, _run(program, program.arguments(ids))[0])

    def check(self, program: Program) -> None:
        """Compare the graph with a cache.

        Raises:
            VerificationError: naming the run that differs, and by how much.
            UnsupportedModelError: it does not run.
        """
        try:
            self._compare_runs(program)
        except RuntimeError as error:
            message = (
                f"--kv-cache: the graph with a cache does not run ({error}); something in the "
                "model depends on positions in a way that the rewrite does not follow. Compile "
                "without --kv-cache."
            )
            raise UnsupportedModelError(message) from error

    def _compare_runs(self, program: Program) -> None:
        ones = torch.ones_like(self.ids)
        empty = _empty_cache(program, self.ids.shape[0])
        whole = _run(program, [self.ids, ones, *empty])
        self._compare("the whole sequence", whole[0], self.logits)
        head = _run(program, [self.ids[:, :FIRST], ones[:, :FIRST], *empty])
        tail = _run(program, [self.ids[:, FIRST:], ones, *head[1:]])
        self._compare("the second chunk", tail[0], self.logits[:, FIRST:])
        for side in ("left", "right"):
            self._padded(program, side)

    def _padded(self, program: Program, side: str) -> None:
        """Row 0 padded in its first chunk, row 1 whole; then a chunk of both."""
        keep = TOKENS - PADDING
        ids, mask = self.ids.clone(), torch.ones_like(self.ids)
        hidden = slice(0, PADDING) if side == "left" else slice(keep, TOKENS)
        shown = slice(PADDING, TOKENS) if side == "left" else slice(0, keep)
        ids[0, shown], ids[0, hidden], mask[0, hidden] = self.ids[0, :keep], 0, 0
        found = _run(program, [ids, mask, *_empty_cache(program, 2)])
        self._compare(f"a row padded on the {side}", found[0][0, shown], self.logits[0, :keep])
        self._compare("its neighbour", found[0][1], self.logits[1])
        rest = self.ids[:, keep:]
        longer = torch.cat((mask, torch.ones_like(rest)), 1)
        after = _run(program, [rest, longer, *found[1:]])
        self._compare(f"after padding on the {side}", after[0][0], self.logits[0, keep:])

    def _compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        error = float((found - expected).abs().max() / self.logits.abs().max())
        if not error <= TOLERANCE:
            message = (
                f"--kv-cache: with a cache the logits of {what} differ by {error:.2e} of the "
                f"largest, expected at most {TOLERANCE:.0e}; something in the model depends on "
                "positions in a way that the rewrite does not follow. Compile without --kv-cache."
            )
            raise VerificationError(message)


_EMBEDDING = torch.ops.aten.embedding.default


def _empty_cache(program: Program, batch: int) -> list[Tensor]:
    """Float caches without tokens, for runs in which nothing is quantised."""
    found = []
    for node in program.call_nodes(cache_ops.cached_attention):
        key = node.args[3]
        assert isinstance(key, torch.fx.Node)
        _, heads, _, width = key.meta["val"].shape
        width = width * 2 if node.args[BITS] == 4 else width
        empty = torch.zeros((batch, heads, 0, width), device=program.device)
        found += [empty, empty]
    return found


def _relative(scale: Tensor) -> Tensor:
    """The scale over its mean: scores stay about as large as they are."""
    return scale / scale.mean()


def _attend(given: cache_ops.CachedAttention) -> tuple[Tensor, Tensor, Tensor]:
    """A cached attention on a float cache."""
    past = (given.past_key, given.past_value)
    scales = (given.key_scale, given.value_scale)
    key, value = (
        torch.cat((before, new if scale is None else new * _relative(scale)), 2)
        for before, new, scale in zip(past, given.new_values(), scales, strict=True)
    )
    return replace(given, key_scale=None, value_scale=None).attend(key, value), key, value


@torch.no_grad()
def _run(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All outputs, with quantisers of activations passing values on and float caches."""
    module = program.module
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr")]
    environment: Environment = bind_inputs(module, inputs, None)
    dying = last_uses(nodes)
    value: Any = None
    for node in nodes:
        if node.target is ops.fake_quantize:
            value = environment[node.all_input_nodes[0]]
        elif node.target is cache_ops.stored:
            x, scale, _ = arguments(module, node, environment)
            value = x * _relative(scale)
        elif node.target is cache_ops.cached_attention:
            value = _attend(cache_ops.CachedAttention(*arguments(module, node, environment)))
        else:
            value = run_node(module, node, environment, None)
        environment[node] = value
        for dead in dying.get(node, ()):
            environment.pop(dead, None)
    return value if isinstance(value, tuple) else (value,)
