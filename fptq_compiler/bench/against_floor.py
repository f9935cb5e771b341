"""Times of models and operators, each beside the least that the device would need for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fptq_compiler.bench.devices import Device
from fptq_compiler.bench.floors import least_seconds
from fptq_compiler.bench.measure import Step, time_in_turns
from fptq_compiler.bench.model import open_model
from fptq_compiler.bench.operators import CachedAttention, Form, Matmul, step_of
from fptq_compiler.bench.result import Settings, spread
from fptq_compiler.bench.run import time_points
from fptq_compiler.errors import RuntimeLoadError
from fptq_compiler.progress import Progress
from fptq_compiler.runtime.model_file import ModelFile

INTB: Final = {"ep.cuda.fpa_intb_gemm": "1"}
"""ONNX Runtime's kernel of float16 by INT4 on tensor cores, which is off by default."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: was called: a step, or the shape of a matmul.
        form: of the model or operator.
        seconds: of one call, the median; None where the provider has no such kernel.
        floor: the least.
        faster: than the float form, the median of the ratios within each round; None likewise.
    """

    what: str
    form: str
    seconds: float | None
    floor: float
    faster: float | None


def model_rows(
    label: str, file: ModelFile, plain: ModelFile, settings: Settings, device: Device,
    progress: Progress,
) -> Iterator[Row]:
    """Times the prefills and decode steps of a file, in turns with the one in float."""
    models = {"A": open_model(file, settings.provider, settings.threads)}
    if file is not plain:
        models["B"] = open_model(plain, settings.provider, settings.threads)
    for point in time_points(models, settings, progress):
        tokens, past = (point.length, 0) if point.kind == "prefill" else (1, point.length)
        ratio = point.speed_up()
        yield Row(
            f"{point.kind} {point.length}", label, point.latency("A").median,
            least_seconds(file, device, tokens, past), 1.0 if ratio is None else ratio.median,
        )


def matmul_rows(
    shape: tuple[int, int, int], dtype: np.dtype[Any], settings: Settings, device: Device,
    progress: Progress, streamed: int,
) -> Iterator[Row]:
    """Times one weight of (M, K, N) in float, INT8 by INT8, and INT4 without and with fpA_intB.

    Args:
        shape: M, K and N.
        dtype: of the activations that are float.
        settings: provider, threads and rounds.
        device: whose limits count.
        progress: who listens.
        streamed: bytes of weights in a graph for few rows.
    """
    forms: dict[str, tuple[Form, Mapping[str, str]]] = {
        str(dtype): ("MatMul", {}),
        "INT8 x INT8": ("MatMulInteger", {}),
        "INT4 weight": ("MatMulNBits", {}),
        "INT4 weight, fpA_intB": ("MatMulNBits", INTB),
    }
    steps: dict[str, Step] = {}
    floors, copies = {}, {}
    for label, (form, config) in forms.items():
        case = Matmul(form, *shape, dtype)
        with suppress(RuntimeLoadError):
            steps[label] = step_of(case.model(streamed), case.feeds(), settings, config)
        copies[label] = case.copies(streamed)
        integer = form == "MatMulInteger"
        floors[label] = device.floor(case.weight_bytes, case.operations, integer=integer)
    what = "{} x {} x {}".format(*shape)
    times = time_in_turns(steps, settings.repeats, progress, what)
    each = {label: [t / copies[label] for t in values] for label, values in times.items()}
    yield from _rows(what, each, floors)


def attention_rows(
    tokens: int, past: int, heads: tuple[int, int, int], dtype: np.dtype[Any],
    settings: Settings, device: Device, progress: Progress,
) -> Iterator[Row]:
    """Times GroupQueryAttention on caches in float, INT8 and INT4.

    Args:
        tokens: new ones.
        past: cached ones.
        heads: of queries, of keys and values, and the width of each.
        dtype: of queries and of the float cache.
        settings: provider, threads and rounds.
        device: whose limits count.
        progress: who listens.
    """
    steps: dict[str, Step] = {}
    floors = {}
    for cache in (str(dtype), "int8", "int4"):
        case, label = CachedAttention(cache, tokens, past, *heads, dtype), f"{cache} cache"
        with suppress(RuntimeLoadError):
            steps[label] = step_of(case.model(), case.feeds(), settings, {})
        floors[label] = device.floor(case.cache_bytes, case.operations, integer=False)
    what = f"attention, {tokens} behind {past}"
    yield from _rows(what, time_in_turns(steps, settings.repeats, progress, what), floors)


def _rows(
    what: str, times: Mapping[str, Sequence[float]], floors: Mapping[str, float]
) -> Iterator[Row]:
    """A row a form; the first is the float one."""
    plain = times.get(next(iter(floors)))
    for label, floor in floors.items():
        values = times.get(label)
        if values is None:
            yield Row(what, label, None, floor, None)
            continue
        ratios = [a / b for a, b in zip(plain or (), values, strict=plain is not None)]
        faster = spread(ratios).median if ratios else None
        yield Row(what, label, spread(values).median, floor, faster)
