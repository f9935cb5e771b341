"""Closed configuration: frozen dataclasses read from tables, written as TOML, nothing ignored.

An unknown key is an error that names the nearest known one, and a value of the wrong type or
range says what was expected. A field whose text differs from its value carries two functions
in its metadata, made by `spelled`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fptq_compiler.errors import RecipeError

_Record = TypeVar("_Record")


def nearest(name: str, known: Collection[str]) -> str:
    """Says which of `known` lies nearest to `name`, or lists them all when none is near."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def check_one_of(what: str, value: object, allowed: Collection[object]) -> None:
    """Raises RecipeError unless `value` is one of `allowed`."""
    if value in allowed:
        return
    choices = ", ".join(str(entry) for entry in allowed)
    message = f"{what} is {value!r}, expected one of {choices}"
    if isinstance(value, str):
        close = get_close_matches(value, [str(entry) for entry in allowed], n=1, cutoff=0.5)
        message += f": did you mean {close[0]!r}?" if close else ""
    raise RecipeError(message)


def check_at_least(what: str, value: float, least: float) -> None:
    """Raises RecipeError unless `value` is finite and at least `least`."""
    if not least <= value < float("inf"):
        message = f"{what} is {value!r}, expected a finite number of at least {least}"
        raise RecipeError(message)


def spelled(
    read: Callable[[str, object], object], write: Callable[[Any], object]
) -> dict[str, Any]:
    """Metadata of a field whose text differs from its value.

    Args:
        read: from the field's dotted name and the TOML value to the field's value.
        write: from the field's value to a TOML value.
    """
    return {"read": read, "write": write}


def read_record(kind: type[_Record], table: Mapping[str, object], where: str = "") -> _Record:
    """Makes a dataclass from a table of its fields; those left out keep their defaults.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, tuple[str, ...], other such
            dataclasses, or `spelled`.
        table: what was read.
        where: the dotted name of the table, with a dot at its end, or empty at the top.

    Raises:
        RecipeError: an unknown key, or a value of the wrong type or range.
    """
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)
    values: dict[str, object] = {}
    for key, value in table.items():
        if key not in known:
            message = f"unknown key {where + key!r}: {nearest(key, known)}"
            raise RecipeError(message)
        values[key] = _read_value(known[key], types[key], value, where + key)
    return kind(**values)


def write_record(record: object) -> str:
    """Writes a dataclass as TOML: its plain fields, then a table for each record in it.

    Records in records in records would need dotted table names; there are none.
    """
    plain: list[str] = []
    tables: list[str] = []
    for entry in fields(record):  # type: ignore[arg-type]
        value = getattr(record, entry.name)
        if "write" in entry.metadata:
            plain.append(f"{entry.name} = {_toml(entry.metadata['write'](value))}")
        elif is_dataclass(value):
            tables.append(f"[{entry.name}]\n{write_record(value)}")
        else:
            plain.append(f"{entry.name} = {_toml(value)}")
    return "\n".join(["\n".join(plain) + "\n", *tables])


def _read_value(entry: Field[Any], kind: Any, value: object, name: str) -> object:
    """Turns one TOML value into a field's value, or raises RecipeError."""
    if "read" in entry.metadata:
        return entry.metadata["read"](name, value)
    if is_dataclass(kind):
        if isinstance(value, dict):
            return read_record(kind, value, name + ".")  # type: ignore[arg-type]
        raise _wrong_type(name, value, f"a table [{name}]")
    if get_origin(kind) is tuple and get_args(kind) == (str, ...):
        return read_names(name, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        raise _wrong_type(name, value, words[kind])
    return value


def read_names(name: str, value: object) -> tuple[str, ...]:
    """Reads a list of strings."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise _wrong_type(name, value, "a list of strings")


def _wrong_type(name: str, value: object, expected: str) -> RecipeError:
    return RecipeError(f"{name} is {value!r}, expected {expected}")


def _toml(value: object) -> str:
    """Spells one TOML value; JSON's strings and lists of strings are TOML's too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
