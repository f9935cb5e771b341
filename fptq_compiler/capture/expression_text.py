"""The grammar of symbolic sizes and guards in a serialised program.

torch prints a size as `Mul(Integer(8), Symbol('s70', positive=True, integer=True))` (or, older,
as `8*s70`) and reads it back with `sympy.sympify`, which is `eval`. A guard such as
`L['ids'].size()[1] >= 2` is executed. Only these forms pass; Python's own parser says what the
text is, so that no spelling trick can look like something else.
"""

from __future__ import annotations

import ast
import re
from typing import NoReturn

from fptq_compiler.errors import CaptureError

# No newline, backslash, bracket, '!' other than in '!=', or letter beyond ASCII.
_TEXT = re.compile(r"(?:[A-Za-z0-9_+\-*/%(),. <>=&|~']|!=){1,4096}", re.ASCII)
_GUARD_TEXT = re.compile(r"(?:[A-Za-z0-9_+\-*/%(),. <>=&|~'\[\]]|!=){1,4096}", re.ASCII)
_SYMBOL = re.compile(r"(?:s|u|zf|zuf|ps|i)\d{1,6}", re.ASCII)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_CONSTANTS = frozenset({"oo", "int_oo", "true", "false"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_FUNCTIONS = _POWERS | {
    # sympy
    "Integer", "Rational", "Float", "Add", "Mul", "Max", "Min", "Mod", "floor", "ceiling", "Abs",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair",
    # torch.utils._sympy.functions
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt",
    "CeilDiv", "RShift", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator",
    "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
}  # fmt: skip
_SYMBOL_PROPERTIES = frozenset(
    {"positive", "integer", "nonnegative", "real", "finite", "negative", "nonzero", "zero"}
)
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr,
    ast.USub, ast.UAdd, ast.Invert, ast.Not, ast.And, ast.Or,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_LARGEST_INTEGER = 2**64
_LARGEST_EXPONENT = 16
_DEEPEST = 64
_GUARD_FUNCTIONS = frozenset({"min", "max"})
_GUARD_METHODS = frozenset({"size", "stride", "storage_offset", "dim"})


class _NotAllowedError(ValueError):
    """The text leaves the grammar; the message says where."""


def check_expression(text: object, part: str, field: str = "expr_str") -> None:
    """Refuse a symbolic size that is more than arithmetic on sizes.

    Args:
        text: the expression as it stands in the file.
        part: name of the archive part, for messages.
        field: name of the field, for messages.

    Raises:
        CaptureError: naming the part and what is not allowed.
    """
    _check(text, part, field, _TEXT, guard=False)


def check_guard(text: object, part: str) -> None:
    """Refuse a shape guard that is more than a comparison of input sizes.

    Raises:
        CaptureError: naming the part and what is not allowed.
    """
    _check(text, part, "guards_code", _GUARD_TEXT, guard=True)


def _check(text: object, part: str, field: str, shape: re.Pattern[str], *, guard: bool) -> None:
    if not isinstance(text, str) or not shape.fullmatch(text):
        _refuse(part, field, text, "characters or a length that no size expression has")
    try:
        tree = ast.parse(text, mode="eval")
        _visit(tree.body, guard=guard, depth=0)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        _refuse(part, field, text, str(error))


def _visit(node: ast.expr, *, guard: bool, depth: int) -> None:
    """Accept numbers, symbols, arithmetic, comparisons and calls of known functions."""
    if depth > _DEEPEST:
        message = "nesting beyond what a size needs"
        raise _NotAllowedError(message)
    children: list[ast.expr]
    match node:
        case ast.Constant(value=bool() | float()):
            return
        case ast.Constant(value=int() as value) if value <= _LARGEST_INTEGER:
            return
        case ast.Name(id=name) if _SYMBOL.fullmatch(name) or name in _CONSTANTS:
            return
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            _visit_power(left, right)
            children = [left, right]
        case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _OPERATORS):
            children = [left, right]
        case ast.UnaryOp(op=operator, operand=operand) if isinstance(operator, _OPERATORS):
            children = [operand]
        case ast.BoolOp(values=values):
            children = values
        case ast.Compare(left=left, ops=operators, comparators=comparators) if all(
            isinstance(operator, _OPERATORS) for operator in operators
        ):
            children = [left, *comparators]
        case ast.Call(func=ast.Name(id="Symbol")):
            _visit_symbol(node)
            return
        case ast.Call(func=ast.Name(id=name), args=children, keywords=keywords) if (
            name in _FUNCTIONS or (guard and name in _GUARD_FUNCTIONS)
        ):
            if name == "Float":
                _visit_float(node)
                return
            if keywords:
                message = f"{name} with keywords"
                raise _NotAllowedError(message)
            if name in _POWERS and len(children) == 2:
                _visit_power(children[0], children[1])
        case ast.Tuple(elts=children):
            pass
        case _ if guard:
            _visit_input(node)
            return
        case _:
            message = f"'{ast.unparse(node)[:80]}' is no arithmetic on sizes"
            raise _NotAllowedError(message)
    for child in children:
        _visit(child, guard=guard, depth=depth + 1)


def _visit_power(base: ast.expr, exponent: ast.expr) -> None:
    """Powers are written out by sympy: keep the exponent small and the base free of powers."""
    match exponent:
        case ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant(value=int() as value)]):
            pass
        case ast.Constant(value=int() as value):
            pass
        case _:
            message = f"the exponent '{ast.unparse(exponent)[:80]}' is no integer"
            raise _NotAllowedError(message)
    nested = any(
        isinstance(inner, ast.Pow) or (isinstance(inner, ast.Name) and inner.id in _POWERS)
        for inner in ast.walk(base)
    )
    if value > _LARGEST_EXPONENT or nested:
        message = f"a power beyond {_LARGEST_EXPONENT}, or a power of a power"
        raise _NotAllowedError(message)


def _visit_symbol(node: ast.Call) -> None:
    """`Symbol('s70', positive=True, integer=True)` and nothing else."""
    match node.args:
        case [ast.Constant(value=str() as name)] if _SYMBOL.fullmatch(name):
            pass
        case _:
            message = f"'{ast.unparse(node)[:80]}' names no size symbol such as s0"
            raise _NotAllowedError(message)
    for keyword in node.keywords:
        plain = isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool)
        if keyword.arg not in _SYMBOL_PROPERTIES or not plain:
            message = f"'{ast.unparse(node)[:80]}' has an unknown property"
            raise _NotAllowedError(message)


def _visit_float(node: ast.Call) -> None:
    """`Float('0.5', precision=53)` and nothing else."""
    match (node.args, node.keywords):
        case (
            [ast.Constant(value=str() | int() | float() as value)],
            [] | [ast.keyword(arg="precision", value=ast.Constant(value=53))],
        ):
            if re.fullmatch(r"-?[0-9.]{1,40}(e[+-]?[0-9]{1,3})?", str(value), re.ASCII):
                return
    message = f"'{ast.unparse(node)[:80]}' is no number"
    raise _NotAllowedError(message)


def _visit_input(node: ast.expr) -> None:
    """`L['ids'].size()[1]`: subscripts by name or number, and methods that read a shape."""
    while True:
        match node:
            case ast.Name(id="L"):
                return
            case ast.Subscript(value=inner, slice=ast.Constant(value=bool() | int())):
                node = inner
            case ast.Subscript(value=inner, slice=ast.Constant(value=str() as key)) if (
                _KEY.fullmatch(key)
            ):
                node = inner
            case ast.Call(func=ast.Attribute(value=inner, attr=method), args=[], keywords=[]) if (
                method in _GUARD_METHODS
            ):
                node = inner
            case _:
                message = f"'{ast.unparse(node)[:80]}' is no size of an input"
                raise _NotAllowedError(message)


def _refuse(part: str, field: str, text: object, reason: str) -> NoReturn:
    shown = repr(text) if len(repr(text)) <= 120 else repr(text)[:117] + "..."
    message = (
        f"{part}: field {field!r} holds {shown}, expected arithmetic on sizes ({reason}). "
        "The archive is refused, because torch would evaluate this text while loading it. "
        "Export the model again with torch.export.save."
    )
    raise CaptureError(message)
