"""Raise every spelling of RMSNorm to `fptq.rms_norm(x, gain, epsilon)`, and LayerNorm to aten's.

Matched: `aten.rms_norm`, and x * rsqrt(mean(x^2) + epsilon) with x^2 as pow or as x * x, the
inverse root as rsqrt, pow(-0.5), reciprocal of sqrt or a division, with the casts to float32
that libraries put around the statistics, the gain multiplied on either side; and sqrt(d) times
`functional.normalize`. Where x is itself y - mean(y), the whole is `aten.layer_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.patterns import (
    Alt,
    Commutes,
    Match,
    Maybe,
    NoMatch,
    Op,
    Var,
    deepest,
    match,
)
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import NearMiss, Program, source_line
from fptq_compiler.graph.surgery import call, replace
from fptq_compiler.passes.canonicalize import CASTS

aten = torch.ops.aten
MULTIPLY = (aten.mul.Tensor,)
EXPANSIONS = (aten.expand_as.default, aten.expand.default)
SQUARE = Alt(
    (
        Op((aten.pow.Tensor_Scalar,), (Var("x"), Var("power"))),
        Op((aten.square.default,), (Var("x"),)),
        Op(MULTIPLY, (Var("x"), Var("x"))),
    )
)
MEAN = Op((aten.mean.dim,), (SQUARE, Var("axes"), Var("keep")))
SHIFTED = Commutes((aten.add.Tensor, aten.add.Scalar), MEAN, Var("epsilon"))
ROOT = Op((aten.sqrt.default,), (SHIFTED,))
RECIPROCAL = Op((aten.reciprocal.default,), (ROOT,))
INVERSE = Alt(
    (
        Op((aten.rsqrt.default,), (SHIFTED,)),
        RECIPROCAL,
        Op(MULTIPLY, (RECIPROCAL, Var("one"))),  # how 1 / sqrt(...) is exported
        Op((aten.pow.Tensor_Scalar,), (SHIFTED, Var("root_power"))),
        Op((aten.div.Tensor,), (Var("one"), ROOT)),
    )
)
NORM = Alt(
    (
        Commutes(MULTIPLY, Var("x"), INVERSE),
        Op((aten.div.Tensor,), (Var("x"), ROOT)),
    )
)
LENGTH = Op(
    (aten.linalg_vector_norm.default,), (Var("x"), Var("order"), Var("axes"), Var("keep"))
)
UNIT = Op(
    (aten.div.Tensor,),
    (Var("x"), Maybe(EXPANSIONS, Op((aten.clamp_min.default,), (LENGTH, Var("least"))))),
)
SCALED_UNIT = Op(MULTIPLY, (UNIT, Var("root")))
CENTERED = Op(
    (aten.sub.Tensor,), (Var("y"), Op((aten.mean.dim,), (Var("y"), Var("axes"), Var("keep"))))
)
TINY = 1e-6  # of a length; a token that short is no token
INVERSE_ROOTS = (aten.rsqrt.default, aten.sqrt.default)


class RaiseNorms(Pass):
    """Replace spelled-out RMSNorms, and torch's own, by the composite operator."""

    requires = ("canonical",)
    provides = ("norms_raised",)

    def run(self, program: Program) -> PassResult:
        """Raise all norms, then take the gains in."""
        changed = 0
        matched: set[Node] = set()
        for node in list(program.graph.nodes):
            if node.target is aten.rms_norm.default:
                changed += _raise_operator(node)
            elif node.target in (aten.mul.Tensor, aten.div.Tensor):
                if _raise_unit(node):
                    changed += 1
                    continue
                found = match(NORM, node)
                if isinstance(found, Match) and not _unsound(found, node):
                    matched.update(found.nodes)
                    _raise_spelling(found, node)
                    changed += 1
        for node in list(program.graph.nodes):
            if node.target is ops.rms_norm and node.args[1] is None:
                _take_gain(program, node)
        for node in program.call_nodes(ops.rms_norm):
            _take_mean(node)
        for node in program.call_nodes(aten.layer_norm.default):
            if not any(node.args[2:4]):
                _take_gain(program, node)
        for node in program.call_nodes(aten.layer_norm.default):
            if len(node.args) > 4 and node.args[3] is None:
                _take_bias(program, node)
        misses = [
            NearMiss("norm", n.name, _reason(n), source_line(n))
            for n in program.graph.nodes
            if n.target in INVERSE_ROOTS and n not in matched
        ]
        return PassResult(changed, tuple(misses))


def _raise_operator(node: Node) -> int:
    x, shape = input_node(node), node.args[1]
    if not isinstance(shape, (list, tuple)) or len(shape) != 1:
        return 0
    gain = node.args[2] if len(node.args) > 2 else None
    epsilon = node.args[3] if len(node.args) > 3 else None
    if epsilon is None:
        epsilon = torch.finfo(x.meta["val"].dtype).eps
    replace(node, call(node.graph, node, ops.rms_norm, (x, gain, epsilon), like=node))
    return 1


def _raise_unit(node: Node) -> bool:
    """sqrt(d) x / max(|x|, least) is an RMSNorm with the epsilon least² / d, but for tiny x."""
    found = match(SCALED_UNIT, node)
    if not isinstance(found, Match):
        return False
    value = node.meta["val"]
    width, root, least = value.shape[-1], found["root"], found["least"]
    sound = (
        [axis % value.dim() for axis in found["axes"]] == [value.dim() - 1]
        and found["keep"] is True and found["order"] == 2
        and isinstance(root, float) and abs(root * root - width) < 1e-9 * width
        and isinstance(least, float) and least < TINY
    )
    if not sound:
        return False
    arguments = (found["x"], None, least * least / width)
    replace(node, call(node.graph, node, ops.rms_norm, arguments, like=node))
    return True


def _unsound(found: Match, node: Node) -> str:
    """What is wrong with the numbers, or nothing: the last axis, kept, squared, and so on."""
    rank = node.meta["val"].dim()
    bindings = found.bindings
    checks = (
        ([a % rank for a in bindings["axes"]] == [rank - 1],
         f"the mean is over axes {bindings['axes']}, expected the last"),
        (bindings["keep"] is True, "the mean drops its axis"),
        (bindings.get("power", 2) == 2, f"the power is {bindings.get('power')}, expected 2"),
        (bindings.get("root_power", -0.5) == -0.5,
         f"the power of the mean is {bindings.get('root_power')}, expected -0.5"),
        (bindings.get("one", 1) == 1, f"the root divides {bindings.get('one')}, expected 1"),
        (isinstance(bindings["epsilon"], float),
         f"epsilon is {bindings['epsilon']}, expected a literal"),
    )
    return next((reason for holds, reason in checks if not holds), "")


def _raise_spelling(found: Match, node: Node) -> None:
    x = found["x"]
    wide_source = x
    while isinstance(x, Node) and x.target in CASTS and _only_widens(x):
        x = x.args[0]
    raised = call(node.graph, node, ops.rms_norm, (x, None, found["epsilon"]), like=node)
    if x is not wide_source:
        raised.meta["val"] = node.meta["val"].to(x.meta["val"].dtype)
        for reader in list(node.users):
            if reader.target in CASTS and reader.meta["val"].dtype == x.meta["val"].dtype:
                replace(reader, raised)
        if node.users:
            widened = call(
                node.graph, node, aten.to.dtype, (raised, node.meta["val"].dtype), like=node
            )
            replace(node, widened)
            return
        node.graph.erase_node(node)
        return
    replace(node, raised)


def _only_widens(cast: Node) -> bool:
    source = input_node(cast)
    before, after = source.meta["val"].dtype, cast.meta["val"].dtype
    return bool(before.is_floating_point and after in (torch.float32, torch.float64))


def _take_gain(program: Program, norm: Node) -> None:
    """Move `norm * gain` into the operator where that product is the norm's only reader."""
    found = _sole_reader(program, norm, aten.mul.Tensor)
    if found is None:
        return
    product, gain = found
    target: Any = norm.target
    if target is ops.rms_norm:
        x, _, epsilon = norm.args
        arguments: tuple[Any, ...] = (x, gain, epsilon)
    else:
        x, shape, _, _, epsilon = norm.args[:5]
        arguments = (x, shape, gain, None, epsilon)
    replace(product, call(norm.graph, product, target, arguments, like=product))


def _take_bias(program: Program, norm: Node) -> None:
    """The same for `norm + bias` behind a LayerNorm."""
    found = _sole_reader(program, norm, aten.add.Tensor)
    if found is None:
        return
    addition, bias = found
    x, shape, gain, _, epsilon = norm.args[:5]
    arguments = (x, shape, gain, bias, epsilon)
    whole = call(norm.graph, addition, aten.layer_norm.default, arguments, like=addition)
    replace(addition, whole)


def _sole_reader(program: Program, norm: Node, target: object) -> tuple[Node, Node] | None:
    """The norm's only reader, if it is a `target` with a parameter (d,), and the parameter."""
    if len(norm.users) != 1:
        return None
    (reader,) = norm.users
    if reader.target is not target or reader.kwargs:
        return None
    left, right = reader.args[0], reader.args[1]
    parameter = right if left is norm else left
    if not isinstance(parameter, Node) or parameter.op != "get_attr":
        return None
    width = norm.meta["val"].shape[-1]
    if tuple(program.held(str(parameter.target)).shape) != (width,):
        return None
    same = reader.meta["val"].dtype == norm.meta["val"].dtype
    return (reader, parameter) if same else None


def _take_mean(norm: Node) -> None:
    """An RMSNorm of y - mean(y) is the LayerNorm of y."""
    x, gain, epsilon = norm.args
    found = match(CENTERED, x)
    rank = norm.meta["val"].dim()
    if not isinstance(found, Match) or found["keep"] is not True:
        return
    if [axis % rank for axis in found["axes"]] != [rank - 1]:
        return
    shape = [norm.meta["val"].shape[-1]]
    arguments = (_narrow(found["y"], norm), shape, gain, None, epsilon)
    replace(norm, call(norm.graph, norm, aten.layer_norm.default, arguments, like=norm))


def _narrow(y: Node, norm: Node) -> Node:
    """What `y` was before it was widened to the type of the statistics."""
    while y.target in CASTS and _only_widens(y):
        source = input_node(y)
        y = source
    return y


def _reason(node: Node) -> str:
    """The deepest failure of the norm pattern behind an inverse root."""
    failure = NoMatch("no product reads the inverse root", node, -1)
    frontier: list[Node] = list(node.users)
    seen: set[Node] = set()
    while frontier:
        reader = frontier.pop()
        if reader in seen or len(seen) > 8:
            continue
        seen.add(reader)
        if reader.target in (aten.reciprocal.default, *MULTIPLY):
            frontier.extend(reader.users)
        if reader.target not in (aten.mul.Tensor, aten.div.Tensor):
            continue
        found = match(NORM, reader)
        if isinstance(found, NoMatch):
            failure = deepest(failure, found)
        else:
            return f"not an RMSNorm: {_unsound(found, reader)}"
    return f"not an RMSNorm: {failure.reason}"
