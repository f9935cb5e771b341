"""One benchmark from files to result: times, then kernels, then memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from fptq_compiler.bench.kernels import profile_steps
from fptq_compiler.bench.measure import Step, time_in_turns
from fptq_compiler.bench.memory import measure_memory
from fptq_compiler.bench.model import OpenModel, open_model
from fptq_compiler.bench.result import (
    Benchmark,
    KernelRow,
    Kind,
    ModelRow,
    Point,
    Settings,
    machine,
    versions,
)
from fptq_compiler.errors import RecipeError
from fptq_compiler.progress import Progress, track
from fptq_compiler.runtime.model_file import ModelFile

LABELS: Final = ("A", "B")


def benchmark(
    model_files: Sequence[ModelFile], settings: Settings, progress: Progress
) -> Benchmark:
    """Measures one model, or two in turns.

    Args:
        model_files: A, and B to compare it with.
        settings: what is measured.
        progress: who listens.

    Raises:
        RuntimeLoadError: a model cannot be opened, or lacks its provider.
        RuntimeInputError: ONNX Runtime fails on a step.
        RecipeError: a length is beyond a model's context, or the two cannot be compared.
    """
    files = dict(zip(LABELS, model_files, strict=False))
    for label, file in files.items():
        check_lengths(label, file, settings)
    models = {
        label: open_model(file, settings.provider, settings.threads)
        for label, file in files.items()
    }
    check_comparable(models)
    points = tuple(time_points(models, settings, progress))
    rows = {label: row_of(model) for label, model in models.items()}
    del models  # what follows opens sessions of its own, one at a time
    for label, file in track(files.items(), progress, "kernels", len(files)):
        rows[label] = replace(rows[label], kernels=kernels_of_model(file, settings))
    for label, file in track(files.items(), progress, "memory", len(files)):
        rows[label] = replace(rows[label], memory=measure_memory(file, settings))
    return Benchmark(settings, rows, points, versions(), machine())


def row_of(model: OpenModel) -> ModelRow:
    """Gives what a model says of itself."""
    file, signature = model.file, model.file.signature
    names = (file.path.name, *file.data_files)
    return ModelRow(
        file.path.name,
        sum((file.path.parent / name).stat().st_size for name in names),
        model.vocabulary,
        model.provider,
        layers=signature.layers or None,
        cache=signature.cache_type,
        context_length=file.settings.context_length,
    )


def check_lengths(label: str, file: ModelFile, settings: Settings) -> None:
    """Refuses lengths beyond the context that the session file gives; none given, none refused.

    Raises:
        RecipeError: naming the option, its value and the context.
    """
    limit = file.settings.context_length
    if limit is None:
        return
    wanted = [("--prompt-lengths", length, length) for length in settings.prompt_lengths]
    if file.signature.layers:
        wanted += [("--decode-at", length, length + 1) for length in settings.decode_at]
    for option, length, positions in wanted:
        if positions > limit:
            message = (
                f"{option} {length} needs {positions} positions, but {label}, {file.path.name}, "
                f"has a context of {limit} (its session file says so)"
            )
            raise RecipeError(message)


def check_comparable(models: Mapping[str, OpenModel]) -> None:
    """Refuses two models that do not do the same work. Types of their caches may differ.

    Raises:
        RecipeError: saying what differs.
    """
    if len(models) < 2:
        return
    first, second = models.values()
    pairs: list[tuple[str, object, object]] = [
        ("vocabularies", first.vocabulary, second.vocabulary),
        ("execution providers (say one with --provider)", first.provider, second.provider),
    ]
    if first.has_cache and second.has_cache:
        name = "caches (layers, KV heads, head size)"
        pairs.append((name, cache_shape(first), cache_shape(second)))
    for what, a, b in pairs:
        if a != b:
            message = (
                f"A and B cannot be compared, they have different {what}: "
                f"{first.file.path.name} {a}, {second.file.path.name} {b}"
            )
            raise RecipeError(message)


def cache_shape(model: OpenModel) -> tuple[int, int, int]:
    """Gives layers, KV heads and head size, which are the same for a cache of any type."""
    signature = model.file.signature
    return signature.layers, signature.kv_heads, signature.head_size


def time_points(
    models: Mapping[str, OpenModel], settings: Settings, progress: Progress
) -> Iterator[Point]:
    """Times every prefill, then every decode step of those models that have a cache."""
    cached = {label: model for label, model in models.items() if model.has_cache}
    plan: list[tuple[Kind, int]] = [("prefill", length) for length in settings.prompt_lengths]
    if cached:
        plan += [("decode", length) for length in settings.decode_at]
    for kind, length in track(plan, progress, "timing", len(plan)):
        those, new, past = (models, length, 0) if kind == "prefill" else (cached, 1, length)
        steps = {
            label: model.step(settings.batch, tokens=new, past=past)
            for label, model in those.items()
        }
        seconds = time_in_turns(steps, settings.repeats, progress, f"{kind} {length}")
        yield Point(kind, length, settings.batch * new, seconds)


def kernels_of_model(file: ModelFile, settings: Settings) -> dict[Kind, tuple[KernelRow, ...]]:
    """Profiles one prefill of the longest prompt and one decode step in the longest context."""
    with tempfile.TemporaryDirectory(prefix="fptq-bench-") as folder:
        prefix = Path(folder) / "profile"
        model = open_model(file, settings.provider, settings.threads, prefix)
        steps: dict[Kind, Step] = {
            "prefill": model.step(settings.batch, max(settings.prompt_lengths), 0)
        }
        if model.has_cache:
            steps["decode"] = model.step(settings.batch, 1, max(settings.decode_at))
        return profile_steps(model.session, steps)
