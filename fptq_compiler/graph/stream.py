"""The residual stream: all values that an orthogonal map of its channels would turn.

From the embedding on, a value turns with the stream if the node that makes it commutes with such
a map; linears read it (their weights take the map back), norms read it, and what is added to it
must turn too, back to the linears and tables that write it. Nothing here looks at the spelling of
a node: each is asked by running it (`graph.commutes`), but for linears, norms and embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.commutes import Answer, Commutes, gain_and_bias, reflection
from fptq_compiler.graph.program import Program

aten = torch.ops.aten
LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
LAYER_NORM = aten.layer_norm.default
NORMS = (ops.rms_norm, LAYER_NORM)


class BrokenStreamError(Exception):
    """The stream is read or written by what no map can follow; carries the node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


@dataclass
class Stream:
    """What was found; nodes in the order of the graph.

    Attributes:
        turned: every value that the map turns, the outputs of norms and writers included.
        tables: embeddings and parameters that begin the stream or are added to it.
        writers: linears whose output turns.
        readers: linears whose input turns.
        norms: norms that read the stream.
        post_norms: norms with a gain through which a branch writes: they stop the map.
        unturned: what else reads the stream and does not change with the map.
    """

    turned: set[Node] = field(default_factory=set)
    tables: list[Node] = field(default_factory=list)
    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    post_norms: list[Node] = field(default_factory=list)
    unturned: list[Node] = field(default_factory=list)


def follow(program: Program, start: Node) -> Stream:
    """All that belongs to the stream which begins at the embedding `start`.

    Raises:
        BrokenStreamError: naming the node that reads it, or adds to it, otherwise.
    """
    return _Following(program, start).run()


def unfolded(commutes: Commutes, norm: Node) -> Node | None:
    """The reader of a norm whose gain and bias no linear can take in; None where all can."""
    return _behind(commutes, norm)[1]


def readers_behind(commutes: Commutes, norm: Node) -> list[Node]:
    """The linears that read a norm, behind moves of tokens at most."""
    return _behind(commutes, norm)[0]


def _behind(commutes: Commutes, norm: Node) -> tuple[list[Node], Node | None]:
    """The linears behind a norm, and a reader, if there is one, that is none and moves nothing."""
    width = commutes.width(norm)
    assert width is not None
    change = gain_and_bias(width)
    linears: list[Node] = []
    frontier, moved = list(norm.users), {norm}
    while frontier:
        reader = frontier.pop()
        if reader.target is LINEAR and reader.args[0] in moved:
            weight = reader.args[1]
            if not isinstance(weight, Node) or weight.op != "get_attr":
                return linears, reader
            linears.append(reader)
        elif reader.op != "call_function":
            return linears, reader
        elif reader not in moved:
            answer = commutes.ask(reader, moved & set(reader.all_input_nodes), change)
            if answer is Answer.OTHER:
                return linears, reader
            if answer is Answer.MAPPED:
                moved.add(reader)
                frontier.extend(reader.users)
    return linears, None


class _Following:
    def __init__(self, program: Program, start: Node) -> None:
        self._program = program
        self._found = Stream()
        self._commutes = Commutes(program.module)
        width = self._commutes.width(start)
        assert width is not None
        self._width = width
        self._reflection = reflection(width)
        self._gain = gain_and_bias(width)
        self._order = {node: i for i, node in enumerate(program.graph.nodes)}
        self._waiting: list[tuple[int, Node]] = []
        self._start = start

    def run(self) -> Stream:
        self._begin(self._start)
        while self._waiting:
            _, node = heappop(self._waiting)
            self._visit(node)
        found = self._found
        for nodes in (found.tables, found.writers, found.readers, found.norms, found.post_norms,
                      found.unturned):
            nodes.sort(key=self._order.__getitem__)
        return found

    def _turn(self, node: Node) -> None:
        if node not in self._found.turned:
            self._found.turned.add(node)
            for reader in node.users:
                heappush(self._waiting, (self._order[reader], reader))

    def _begin(self, table: Node) -> None:
        self._found.tables.append(table)
        self._turn(table)

    def _visit(self, node: Node) -> None:
        """Decide about a node that reads values which turn."""
        if node.op != "call_function":
            reason = "the residual stream is what the model gives, not logits of a head"
            raise BrokenStreamError(reason, next(iter(node.all_input_nodes)))
        if node.target is LINEAR and node.args[0] in self._found.turned:
            _note(self._found.readers, node)
        elif node.target in NORMS and node.args[0] in self._found.turned:
            self._visit_norm(node)
        else:
            self._visit_call(node)

    def _visit_norm(self, norm: Node) -> None:
        if norm in self._found.post_norms:
            return
        _note(self._found.norms, norm)
        reader = unfolded(self._commutes, norm) if has_gain(norm) else None
        if reader is not None:
            reason = f"the gain stays: {reader.name} reads the norm and is no plain linear"
            raise BrokenStreamError(reason, reader)
        self._turn(norm)

    def _visit_call(self, node: Node) -> None:
        mapped = self._found.turned & set(node.all_input_nodes)
        answer = self._commutes.ask(node, mapped, self._reflection)
        if answer is Answer.OTHER:
            added = [x for x in self._wide_inputs(node) if x not in mapped]
            both = mapped | set(added)
            if not added or self._ask(node, both) is not Answer.MAPPED:
                reason = f"{node.name} ({node.target}) reads the residual stream"
                raise BrokenStreamError(reason, node)
            for value in added:
                self._trace_back(value)
            self._turn(node)
        elif answer is Answer.MAPPED:
            self._turn(node)
        elif self._commutes.ask(node, mapped, self._gain) is not Answer.SAME:
            _note(self._found.unturned, node)

    def _ask(self, node: Node, mapped: set[Node]) -> Answer:
        return self._commutes.ask(node, mapped, self._reflection)

    def _wide_inputs(self, node: Node) -> list[Node]:
        return [x for x in node.all_input_nodes if self._commutes.width(x) == self._width]

    def _trace_back(self, value: Node) -> None:
        """Make `value`, which is added to the stream, turn with it: back to all that writes it."""
        if value in self._found.turned:
            return
        if value.op == "get_attr" or value.target is EMBEDDING:
            self._begin(value)
            return
        if value.target is LINEAR:
            _note(self._found.writers, value)
        elif value.target in NORMS and (has_gain(value) or value.target is LAYER_NORM):
            _note(self._found.post_norms, value)
        elif not self._commutes.is_zero(value):
            inputs = self._wide_inputs(value)
            if not inputs or self._ask(value, set(inputs)) is not Answer.MAPPED:
                reason = f"{value.name} adds to the stream and is not a linear layer"
                raise BrokenStreamError(reason, value)
            for source in inputs:
                self._trace_back(source)
        self._turn(value)


def has_gain(norm: Node) -> bool:
    """Whether a norm has a gain or a bias."""
    if norm.target is LAYER_NORM:
        return any(x is not None for x in norm.args[2:4])
    return norm.args[1] is not None


def _note(nodes: list[Node], node: Node) -> None:
    if node not in nodes:
        nodes.append(node)
