"""Check the text of a serialised program before torch reads it.

A torch.export archive describes its graph in JSON, and torch trusts that JSON: symbolic sizes go
through `sympy.sympify`, which evaluates them; operators are looked up with `getattr` from
`torch`; node, argument and parameter names, and the shape guards, are pasted into generated
Python. Each of these is a way to run code without a single pickle, so each must follow a closed
grammar here. Nothing is imported or evaluated by these checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from fptq_compiler.capture.archive_reader import CACHES
from fptq_compiler.capture.expression_text import check_expression, check_guard
from fptq_compiler.errors import CaptureError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}", re.ASCII)
_DOTTED = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", re.ASCII)
_CALL_PATH = re.compile(r"([A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)?(@\d{1,6})?", re.ASCII)
_SYMBOL = re.compile(r"(?:s|u|zf|zuf|ps|i)\d{1,6}", re.ASCII)
_LIBRARY_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|fptq)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)", re.ASCII
)
# These operators reach outside the tensors that they are given.
_REFUSED_OPERATORS = frozenset({"from_file", "save", "_print"})
_HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "scan", "while_loop")
)
# What transformers exports a mixture of experts with; it multiplies tensors, like aten's own.
_EXPERTS = frozenset({"torch.ops.transformers.grouped_mm_fallback.default"})
_SYMBOLIC = frozenset(
    [f"_operator.{name}" for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne",
        "lt", "le", "gt", "ge", "and_", "or_", "not_", "getitem", "lshift", "rshift",
    )]
    + [f"math.{name}" for name in ("ceil", "floor", "trunc", "sqrt", "log2", "cos", "sin")]
    + [f"torch.{name}" for name in (
        "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum", "sym_sqrt",
        "_sym_sqrt", "_sym_log2", "_sym_cos", "_sym_sin",
    )]
)  # fmt: skip
_TREE_TYPES = frozenset(
    {None, "builtins.list", "builtins.tuple", "builtins.dict", "collections.OrderedDict"}
)
_TREE_PREFIX = re.compile(r"transformers\.modeling_outputs\.[A-Za-z0-9_]+", re.ASCII)


def check_program_text(document: object, part: str) -> None:
    """Refuse a serialised program whose text could do more than describe a graph.

    Args:
        document: the parsed JSON of `models/model.json`.
        part: name of the archive part, for messages.

    Raises:
        CaptureError: naming the part, the field and the offending text.
    """
    if not isinstance(document, dict) or not isinstance(document.get("graph_module"), dict):
        message = (
            f"{part}: expected a JSON object with a 'graph_module', found {_short(document)}. "
            "Save the program again with torch.export.save."
        )
        raise CaptureError(message)
    for symbol in _mapping(document.get("range_constraints", {}), part, "range_constraints"):
        if not _SYMBOL.fullmatch(symbol):
            _refuse(part, "range_constraints", symbol, "a symbol such as s0")
    for guard in document.get("guards_code") or []:
        check_guard(guard, part)
    try:
        _walk(document, part)
    except RecursionError:
        message = f"{part}: the JSON is nested too deeply to be a program. It is refused."
        raise CaptureError(message) from None


def _walk(value: object, part: str) -> None:
    """Visit every object of the document and check each field that torch acts on."""
    if isinstance(value, list):
        for item in value:
            _walk(item, part)
        return
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        check = _FIELD_CHECKS.get(key)
        if check is not None:
            check(item, part, key)
        if key == "metadata":  # free text: stack traces and module paths, never evaluated
            continue
        if key in _TABLES and isinstance(item, dict):  # its keys are names, not fields
            _walk(list(item.values()), part)
        else:
            _walk(item, part)


def _check_target(value: object, part: str, field: str) -> None:
    """Accept only operators on tensors and sizes: torch resolves the text with getattr."""
    if value in _HIGHER_ORDER or value in _SYMBOLIC or value in _EXPERTS:
        return
    found = _LIBRARY_OPERATOR.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[2] in _REFUSED_OPERATORS:
        expected = "an operator torch.ops.(aten|prims).<name>.<overload> or a size operation"
        _refuse(part, field, value, expected)


def _check_name(value: object, part: str, field: str) -> None:
    """Node and argument names become variables of generated Python."""
    if value is None or value == "" or isinstance(value, dict):
        return
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        _refuse(part, field, value, "a Python identifier")


def _check_names(value: object, part: str, field: str) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        _refuse(part, field, value, "a list of Python identifiers")
    for item in cast(list[object], value):
        _check_name(item, part, field)


def _check_keys(value: object, part: str, field: str) -> None:
    for key in _mapping(value, part, field):
        _check_name(key, part, field)


def _check_path(value: object, part: str, field: str) -> None:
    """Parameter paths are split at dots and pasted into generated attribute accesses."""
    if value is not None and (not isinstance(value, str) or not _DOTTED.fullmatch(value)):
        _refuse(part, field, value, "a dotted parameter name")


def _check_call_path(value: object, part: str, field: str) -> None:
    if not isinstance(value, str) or not _CALL_PATH.fullmatch(value):
        _refuse(part, field, value, "a dotted module name")


def _check_tree(value: object, part: str, field: str) -> None:
    """A tree specification may name types to import: only the plain containers are accepted."""
    try:
        _, tree = json.loads(value)  # type: ignore[arg-type]  # a wrong type is a TypeError
        _walk_tree(tree, part, field)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        _refuse(part, field, value, f"a tree specification ({error})")


def _walk_tree(tree: Mapping[str, Any], part: str, field: str) -> None:
    kind, context = tree["type"], tree["context"]
    cache = kind in CACHES  # torch sees a tuple in its place, and never its context
    named = isinstance(kind, str) and _TREE_PREFIX.fullmatch(kind)
    if kind not in _TREE_TYPES and not cache and not named:
        _refuse(part, field, kind, "a list, tuple or dict of tensors")
    if context is not None and not cache:
        keys = json.loads(context)
        for key in keys if isinstance(keys, list) else []:
            _check_name(key, part, field)
        if keys is not None and not isinstance(keys, list):
            _refuse(part, field, context, "null or a list of names as context")
    for child in tree["children_spec"]:
        _walk_tree(child, part, field)


def _check_custom_object(value: object, part: str, field: str) -> None:
    if value:
        expected = "no custom objects: export the model without script objects"
        _refuse(part, field, value, expected)


def _mapping(value: object, part: str, field: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(part, field, value, "a JSON object")
    return cast(Mapping[str, Any], value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _refuse(part: str, field: str, found: object, expected: str) -> NoReturn:
    message = (
        f"{part}: field {field!r} holds {_short(found)}, expected {expected}. "
        "The archive is refused, because torch would evaluate this text while loading it. "
        "Export the model again with torch.export.save."
    )
    raise CaptureError(message)


_TABLES = frozenset(
    {"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "opset_version"}
    | {"as_string_to_argument", "range_constraints", "treespec_namedtuple_fields"}
)
_FIELD_CHECKS: Mapping[str, Callable[[object, str, str], None]] = {
    "expr_str": check_expression,
    "target": _check_target,
    "as_operator": _check_target,
    "name": _check_name,
    "as_name": _check_name,
    "forward_arg_names": _check_names,
    "tensor_values": _check_keys,
    "sym_int_values": _check_keys,
    "sym_bool_values": _check_keys,
    "sym_float_values": _check_keys,
    "as_string_to_argument": _check_keys,
    "parameter_name": _check_path,
    "buffer_name": _check_path,
    "tensor_constant_name": _check_path,
    "user_input_name": _check_path,
    "fqn": _check_call_path,
    "in_spec": _check_tree,
    "out_spec": _check_tree,
    "custom_obj_values": _check_custom_object,
    "custom_obj": _check_custom_object,
    "as_custom_obj": _check_custom_object,
}
