"""The targets: which node forms, and what a session needs to run them well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fptq_compiler.graph.program import Program


@dataclass(frozen=True)
class Target:
    """One way to write a program as ONNX.

    Attributes:
        name: as `--target` knows it.
        translations: from a frozen program to its emitters by operator.
        expansions: the forms of carried operators by name.
        packed_projections: whether attention reads query, key and value side by side.
        epsilon_channel: whether a scaled stream carries its epsilon as a channel.
        opset: of the standard domain, 21 or later.
        ir_version: of the file.
        providers: ONNX Runtime's execution providers, in order.
        session_config: entries of the session's configuration that the forms rely on.
    """

    name: str
    translations: Callable[[Program], dict[Any, Callable[..., Any]]]
    expansions: Mapping[str, Callable[..., tuple[Any, ...]]]
    packed_projections: bool = False
    epsilon_channel: bool = False
    opset: int = 21
    ir_version: int = 10
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    session_config: Mapping[str, str] = field(default_factory=dict)


def target_of(name: str) -> Target:
    """The target that `--target` names.

    Raises:
        KeyError: there is no such target; recipes refuse the name before.
    """
    from fptq_compiler.lower.targets import ort_cpu, qdq

    return {t.name: t for t in (qdq.TARGET, ort_cpu.TARGET)}[name]
