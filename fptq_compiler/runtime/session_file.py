"""The session file `OUT.onnx.session.json`: how ONNX Runtime is to be set up for a model.

An ONNX file cannot say which providers and session settings it was made for, so it travels with
this one. Written by the compiler, read by the runtime; standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from fptq_compiler.errors import LoweringError, RuntimeLoadError

FORMAT: Final = 1
"""Raised when a reader of the old format would misread a file of the new one."""

FULL_PRECISION: Final = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Weight-only matmuls in float; ONNX Runtime's own default quantises activations to INT8."""


@dataclass(frozen=True)
class SessionFile:
    """What a session of one model needs. The defaults are for a model without such a file.

    Attributes:
        target: the form of the model: qdq, ort-cpu, ort-cuda or tensorrt.
        providers: ONNX Runtime's execution providers, the preferred one first.
        session_config: entries for `SessionOptions.add_session_config_entry`.
        context_length: the most tokens of one sequence, past and new; None if not known.
        bos_token_id: begins a text; None if the model has none.
        eos_token_ids: each of them ends a text.
        arithmetic: in words, what the linears do where that is not what the bits say; or None.
    """

    target: str = "qdq"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    session_config: Mapping[str, str] = field(default_factory=lambda: dict(FULL_PRECISION))
    context_length: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    arithmetic: str | None = None

    def to_json(self) -> str:
        """Gives the file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, model: Path) -> SessionFile:
        """Reads the session file beside a model; a key that is missing has its default.

        Args:
            model: the ONNX file.

        Raises:
            RuntimeLoadError: not JSON, another format, or a key or value that is not expected.
        """
        path = session_path(model)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{path}: expected a JSON file ({error}). Compile the model again."
            raise RuntimeLoadError(message) from error
        if not isinstance(content, dict):
            message = f"{path}: expected a JSON object, found {type(content).__name__}"
            raise RuntimeLoadError(message)
        found = content.pop("format", None)
        if found != FORMAT:
            message = (
                f"{path}: format {found!r}, this version reads format {FORMAT}. Use the version "
                "of fptq-compiler that wrote it, or compile the model again."
            )
            raise RuntimeLoadError(message)
        for key, value in content.items():
            _check(path, key, value)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items()
        }
        return cls(**values)


def session_path(model: Path) -> Path:
    """Gives the place of a model's session file: beside it, under its whole name."""
    return model.with_name(f"{model.name}.session.json")


def write_session_file(model: Path, content: SessionFile) -> Path:
    """Writes the session file beside a model and gives its path.

    Args:
        model: the ONNX file, which need not exist yet.
        content: what to write.

    Raises:
        LoweringError: the file cannot be written.
    """
    path = session_path(model)
    try:
        path.write_text(content.to_json(), encoding="utf-8")
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}"
        raise LoweringError(message) from error
    return path


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_text_table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_length(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_id_or_null(value: Any) -> bool:
    return value is None or _is_id(value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


_EXPECTED: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "target": ("a string", _is_text),
    "providers": ("a list of strings, at least one", _is_texts),
    "session_config": ("an object of strings", _is_text_table),
    "context_length": ("a positive integer or null", _is_length),
    "bos_token_id": ("a token id or null", _is_id_or_null),
    "eos_token_ids": ("a list of token ids", _is_ids),
    "arithmetic": ("a string or null", _is_text_or_null),
}
"""Each key's value in words, and whether one is such a value."""


def _check(path: Path, key: str, value: Any) -> None:
    """Refuses a key that does not exist, and a value of another kind.

    Raises:
        RuntimeLoadError: naming the key.
    """
    if key not in _EXPECTED:
        known = ", ".join(entry.name for entry in fields(SessionFile))
        message = f"{path}: unknown key {key!r}, expected some of format, {known}"
        raise RuntimeLoadError(message)
    expected, is_expected = _EXPECTED[key]
    if not is_expected(value):
        message = f"{path}: {key} is {json.dumps(value)}, expected {expected}"
        raise RuntimeLoadError(message)
