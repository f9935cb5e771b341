"""Prove by running that a graph of token ids alone computes what the captured one computed.

The captured graph runs in float64 with its plain inputs and an empty cache at several lengths.
Where it has a cache it also runs a chunk at a time through that cache, with positions and mask
that go on: then the whole sequence at once must give the same, which shows that positions and
mask of the stripped graph are right. That an input is a mask its name says; that 1 shows a token
to it and 0 hides one is seen by changing that token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fptq_compiler.errors import UnsupportedModelError, VerificationError
from fptq_compiler.graph import evaluate
from fptq_compiler.graph.inputs import input_nodes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import TOLERANCE, relative_error
from fptq_compiler.passes.captured_cache import COPY_BACK, Slot
from fptq_compiler.passes.plain_inputs import is_mask, is_positions

aten = torch.ops.aten
LENGTHS = (1, 2, 7, 11)  # tokens of the runs at once
BOUNDS = (0, 4, 5, 6, 8, 11)  # between the chunks of the run through the cache
HIDDEN = 1  # the token that masks hide; the one before it is there to be seen
ROWS = 2
ASSERTIONS = (
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
)


@dataclass(frozen=True)
class _State:
    """What one run leaves to the next: by which names, and what the first run finds."""

    past: str
    written: str
    first: Tensor


@dataclass(frozen=True)
class WholeProof:
    """The captured graph, as a function of all that it reads.

    Attributes:
        module: inputs and states in, logits and states out.
        ids: name of the token ids' placeholder.
        states: what goes from run to run.
        rows: batch of the runs.
        longest: tokens that the captured graph may see, None without a bound.
    """

    module: GraphModule
    ids: str
    states: tuple[_State, ...]
    rows: int
    longest: int | None

    @classmethod
    def of(
        cls, program: Program, slots: Sequence[Slot] = (), longest: int | None = None
    ) -> WholeProof:
        """Copy the graph before it is rewritten; the parameters are shared."""
        ids = program.node(program.inputs[program.ids_index].name)
        batch = ids.meta["val"].shape[0]
        rows = batch if isinstance(batch, int) else ROWS
        module = GraphModule(program.module, copy.deepcopy(program.graph))
        states = [
            _State(s.past.name, s.joined.name, _empty(s, rows)) for s in slots if not s.length
        ]
        for node in list(module.graph.nodes):
            if node.target is COPY_BACK:
                states.append(_take_out(module, node))
            elif node.target in ASSERTIONS:
                module.graph.erase_node(node)
        _give(module, [s.written for s in states])
        return cls(module, ids.name, tuple(states), rows, longest)

    @torch.no_grad()
    def check(self, program: Program) -> None:
        """Compare with the graph of token ids alone.

        Raises:
            VerificationError: naming the run that differs, and by how much.
            UnsupportedModelError: the captured graph does not run on plain inputs.
        """
        (table, *_) = program.call_nodes(aten.embedding.default)
        assert isinstance(table.args[0], Node)
        vocabulary = int(table.args[0].meta["val"].shape[0])
        most = min(self.longest or LENGTHS[-1], LENGTHS[-1])
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (self.rows, most), generator=generator)
        if most > HIDDEN + 1:
            self._check_masks(ids, vocabulary)
        for length in sorted({min(x, most) for x in LENGTHS}):
            part = ids[:, :length]
            found = _logits(program, part)
            expected, _ = self._step(part, 0, [s.first for s in self.states])
            _compare(f"{length} tokens at once", found, expected)
        if self.states:
            self._check_chunks(found, ids)

    def _check_masks(self, ids: Tensor, vocabulary: int) -> None:
        """A token moves what comes behind it, unless the masks are 0 there."""
        masks = [n for n in self.module.graph.nodes if n.op == "placeholder" and _is_read_mask(n)]
        if not masks:
            return
        other = ids.clone()
        other[:, HIDDEN] = (other[:, HIDDEN] + 1) % vocabulary
        first = [s.first for s in self.states]
        for hidden in (None, HIDDEN):
            runs = [self._step(x, 0, first, hidden)[0][:, HIDDEN + 1 :] for x in (ids, other)]
            moved = relative_error(*runs)
            if (moved <= TOLERANCE) == (hidden is None):
                names = ", ".join(n.name for n in masks)
                shown = "shows no token by 1" if hidden is None else "hides no token by 0"
                message = (
                    f"input {names} {shown}, expected an attention mask of 1 for tokens and 0 for "
                    "padding; export the model with token ids alone (use_cache=False)"
                )
                raise UnsupportedModelError(message)

    def _check_chunks(self, whole: Tensor, ids: Tensor) -> None:
        carried = [s.first for s in self.states]
        bounds = sorted({min(x, ids.shape[1]) for x in BOUNDS})
        for start, stop in pairwise(bounds):
            expected, carried = self._step(ids[:, start:stop], start, carried)
            what = f"tokens {start} to {stop - 1} through the captured cache"
            _compare(what, whole[:, start:stop], expected)

    def _step(
        self, ids: Tensor, start: int, carried: Sequence[Tensor], hidden: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of these tokens behind `start` others, and the states after them.

        Args:
            ids: the tokens (B, S).
            start: how many stand before them.
            carried: the states that the run before has left.
            hidden: a token that the masks hide.
        """
        stored = {s.past: x for s, x in zip(self.states, carried, strict=True)}
        inputs = []
        for node in self.module.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name == self.ids:
                inputs.append(ids.to(node.meta["val"].dtype))
            elif node.name in stored:
                inputs.append(stored[node.name])
            else:
                inputs.append(_plain_value(node, ids, start))
                if hidden is not None and is_mask(node):
                    inputs[-1][:, hidden] = 0
        try:
            logits, *states = evaluate.run(self.module, inputs, dtype=torch.float64)
        except (RuntimeError, IndexError) as error:
            message = (
                f"the model does not run on {ids.shape[1]} tokens behind {start} others as it "
                f"was captured ({str(error).strip()[:300]}); export it with dynamic batch and "
                "sequence dimensions, and without a cache (use_cache=False)"
            )
            raise UnsupportedModelError(message) from error
        return logits, states


def _is_read_mask(node: Node) -> bool:
    return is_mask(node) and bool(node.users)


def _logits(program: Program, ids: Tensor) -> Tensor:
    try:
        return evaluate.logits(program.module, [ids], torch.float64)
    except (RuntimeError, IndexError) as error:
        message = (
            "the model does not run any more without the inputs and the cache that it was "
            f"captured with ({str(error).strip()[:300]}); export it with token ids alone and "
            "without a cache (use_cache=False)"
        )
        raise UnsupportedModelError(message) from error


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        message = (
            f"the model as it was captured gives logits {list(expected.shape)} for {what}, "
            f"expected {list(found.shape)}; export it with logits for every position"
        )
        raise UnsupportedModelError(message)
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        message = (
            f"without the inputs and the cache that the model was captured with, the logits of "
            f"{what} differ by {error:.2e} of the largest, expected at most {TOLERANCE:.0e}; "
            "something in the model depends on them in a way that the rewrite does not follow. "
            "Export the model with token ids alone and without a cache (use_cache=False)."
        )
        raise VerificationError(message)


def _empty(slot: Slot, rows: int) -> Tensor:
    """A growing cache without tokens."""
    shape = [size if isinstance(size, int) else rows for size in slot.past.meta["val"].shape]
    shape[slot.axis] = 0
    return torch.zeros(shape, dtype=slot.past.meta["val"].dtype)


def _plain_value(node: Node, ids: Tensor, start: int) -> Tensor:
    fake = node.meta["val"]
    stop = start + ids.shape[1]
    if is_mask(node):
        return torch.ones((ids.shape[0], stop), dtype=fake.dtype)
    if is_positions(node):
        positions = torch.arange(start, stop, dtype=fake.dtype)
        if fake.dim() == 1:
            return positions
        rows = 1 if fake.shape[0] == 1 else ids.shape[0]
        return positions.expand(rows, -1).contiguous()
    return torch.zeros([1 for _ in fake.shape], dtype=fake.dtype)  # nothing reads it


def _take_out(module: GraphModule, write: Node) -> _State:
    """A buffer that is written back becomes an input."""
    buffer, value = input_nodes(write, 2)
    target = str(buffer.target)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        taken = module.graph.placeholder(f"state_{target.replace('.', '_')}")
    taken.meta = dict(buffer.meta)
    module.graph.erase_node(write)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and node.target == target:
            node.replace_all_uses_with(taken)
            module.graph.erase_node(node)
    return _State(taken.name, value.name, evaluate.attribute(module, target))


def _give(module: GraphModule, names: Sequence[str]) -> None:
    """Logits first, then the named values."""
    nodes = {n.name: n for n in module.graph.nodes}
    (output,) = (n for n in module.graph.nodes if n.op == "output")
    found = output.args[0]
    logits = found[0] if isinstance(found, (tuple, list)) else found
    output.args = ((logits, *(nodes[name] for name in names)),)
    module.graph.eliminate_dead_code()
    module.recompile()
