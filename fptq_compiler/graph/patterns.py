"""Patterns over FX graphs: frozen values, and failures that say what was missing where.

    Op(targets, *arguments)   a call of one of `targets` whose leading arguments match
    Var(name)                 anything; the same name twice must be the same value or computation
    Alt(*patterns)            the first that matches
    Maybe(targets, pattern)   zero or more single-input calls of `targets` around the pattern
    Commutes(targets, a, b)   a binary call in either order

`match` gives a `Match` with the bindings and the nodes it went through, or the deepest
`NoMatch`, so that "why was nothing found" has an answer with a node. Conditions on the
numbers are not a pattern's work: a pass checks them on the bindings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

Target = Callable[..., Any]


@dataclass(frozen=True)
class Var:
    """Anything, remembered under a name."""

    name: str


@dataclass(frozen=True)
class Op:
    """A call of one of `targets`; trailing arguments beyond `arguments` are free."""

    targets: tuple[Target, ...]
    arguments: tuple[Pattern, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Alt:
    """The first of several patterns that matches."""

    choices: tuple[Pattern, ...]


@dataclass(frozen=True)
class Maybe:
    """`inner` under any number of calls of `targets`, followed by their first argument."""

    targets: tuple[Target, ...]
    inner: Pattern


@dataclass(frozen=True)
class Commutes:
    """A binary call whose two arguments match in either order."""

    targets: tuple[Target, ...]
    left: Pattern
    right: Pattern
    name: str = ""


Pattern = Var | Op | Alt | Maybe | Commutes


@dataclass(frozen=True)
class NoMatch:
    """Why a pattern does not fit: the guilty node, in words, and how deep the match had gone."""

    reason: str
    node: Node | None
    depth: int


@dataclass(frozen=True)
class Match:
    """The bindings of the variables and the nodes that the pattern consumed, outermost first."""

    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def bind(self, name: str, value: Any) -> Match:
        """This match and one more binding."""
        return Match({**self.bindings, name: value}, self.nodes)

    def through(self, node: Node) -> Match:
        """This match and one more consumed node."""
        return Match(self.bindings, (*self.nodes, node))


def match(pattern: Pattern, value: Any) -> Match | NoMatch:
    """Match `pattern` at `value` (a node or a literal argument)."""
    return _match(pattern, value, Match(), 0)


def words(targets: tuple[Target, ...]) -> str:
    """The operators' names for a message: `aten.add or aten.sub`."""
    return " or ".join(sorted({_name(t) for t in targets}))


def _name(target: Any) -> str:
    return str(target).removesuffix(".default").removesuffix(".Tensor")


def deepest(first: NoMatch, second: NoMatch) -> NoMatch:
    """The failure that came further, the first where they tie."""
    return second if second.depth > first.depth else first


def _match(pattern: Pattern, value: Any, so_far: Match, depth: int) -> Match | NoMatch:
    match pattern:
        case Var(name):
            return _match_var(name, value, so_far, depth)
        case Op(targets, arguments, name):
            return _match_op(targets, arguments, name, value, so_far, depth)
        case Maybe(targets, inner):
            while isinstance(value, Node) and value.target in targets:
                so_far, value = so_far.through(value), value.args[0]
            return _match(inner, value, so_far, depth)
        case Alt(choices):
            return _first(choices, value, so_far, depth)
        case Commutes(targets, left, right, name):
            both = (Op(targets, (left, right), name), Op(targets, (right, left), name))
            return _first(both, value, so_far, depth)


def _match_var(name: str, value: Any, so_far: Match, depth: int) -> Match | NoMatch:
    if name in so_far.bindings:
        if same_value(so_far.bindings[name], value):
            return so_far
        node = value if isinstance(value, Node) else None
        return NoMatch(f"{value} is not the {name} that stands elsewhere", node, depth)
    return so_far.bind(name, value)


def same_value(first: Any, second: Any) -> bool:
    """Whether two arguments are one value: equal, or the same calls on the same values."""
    if first is second or not (isinstance(first, Node) and isinstance(second, Node)):
        return bool(first is second or first == second)
    alike = first.op == second.op and first.target == second.target
    if not alike or first.op not in ("get_attr", "call_function"):
        return False
    if len(first.args) != len(second.args) or first.kwargs != second.kwargs:
        return False
    return all(same_value(a, b) for a, b in zip(first.args, second.args, strict=True))


def _match_op(
    targets: tuple[Target, ...],
    arguments: tuple[Pattern, ...],
    name: str,
    value: Any,
    so_far: Match,
    depth: int,
) -> Match | NoMatch:
    if not isinstance(value, Node) or value.op != "call_function" or value.target not in targets:
        found = _name(value.target) if isinstance(value, Node) else repr(value)
        node = value if isinstance(value, Node) else None
        return NoMatch(f"expected {words(targets)}, found {found}", node, depth)
    if len(value.args) < len(arguments):
        return NoMatch(f"{_name(value.target)} has {len(value.args)} arguments", value, depth)
    result = so_far.through(value)
    if name:
        result = result.bind(name, value)
    for inner, argument in zip(arguments, value.args, strict=False):
        found_inner = _match(inner, argument, result, depth + 1)
        if isinstance(found_inner, NoMatch):
            return found_inner
        result = found_inner
    return result


def _first(
    choices: tuple[Pattern, ...], value: Any, so_far: Match, depth: int
) -> Match | NoMatch:
    failure: NoMatch | None = None
    for choice in choices:
        found = _match(choice, value, so_far, depth)
        if isinstance(found, Match):
            return found
        failure = found if failure is None else deepest(failure, found)
    assert failure is not None
    return failure
