"""The kernels that really ran, from ONNX Runtime's own profile of single calls.

Profiling itself costs each node some microseconds, which shows where nodes are small. On a GPU a
node's time is that of its launch, for the work itself ends later.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fptq_compiler.bench.measure import Step
from fptq_compiler.bench.result import KernelRow, Kind

_MICROSECOND: Final = 1e-6
_WITH_BODIES: Final = ("If", "Loop", "Scan")
"""Operators whose time is that of the nodes inside of them, which have events of their own."""


def profile_steps(session: Any, steps: Mapping[Kind, Step]) -> dict[Kind, tuple[KernelRow, ...]]:
    """Runs each step twice, the first time to warm up, and reads the profile of the second.

    Args:
        session: the steps' own, created with `enable_profiling`; its profile ends here.
        steps: by kind.
    """
    for step in steps.values():
        step()
        step()
    path = Path(session.end_profiling())
    runs = runs_of(json.loads(path.read_text(encoding="utf-8")))
    last = runs[-2 * len(steps) :][1::2]
    return {kind: kernels_of(nodes) for kind, nodes in zip(steps, last, strict=True)}


def runs_of(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Splits a profile into runs: the kernel events of each stand before its `model_run`.

    Args:
        events: the profile's, in its order.
    """
    runs: list[list[Mapping[str, Any]]] = []
    nodes: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("name") == "model_run":
            runs.append(nodes)
            nodes = []
        elif _is_kernel(event):
            nodes.append(event)
    return runs


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return (
        event.get("cat") == "Node"
        and event["name"].endswith("_kernel_time")
        and event["args"]["op_name"] not in _WITH_BODIES
    )


def kernels_of(nodes: Sequence[Mapping[str, Any]]) -> tuple[KernelRow, ...]:
    """Adds up the kernel events of one run, one row for each kernel and provider.

    Args:
        nodes: events with `dur` in microseconds and `args` that name operator and provider.

    Returns:
        Slowest first.
    """
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        key = (node["args"]["op_name"], node["args"]["provider"])
        times[key].append(node["dur"] * _MICROSECOND)
    rows = [KernelRow(*key, len(values), sum(values)) for key, values in times.items()]
    return tuple(sorted(rows, key=lambda row: row.seconds, reverse=True))
