"""What one benchmark found: the raw times, what follows from them, and all of it as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fptq_compiler.report import collect_versions, write_text_whole

Kind = Literal["prefill", "decode"]
_CPU_INFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Attributes:
        prompt_lengths: tokens of each prefill, at least 1.
        decode_at: positions in the cache before each decode step, at least 1.
        batch: rows of every call.
        threads: of ONNX Runtime within one operator; None leaves it to ONNX Runtime.
        provider: cpu, cuda, or ONNX Runtime's own name of an execution provider; None leaves it
            to each model's session file.
        repeats: timed rounds.
    """

    prompt_lengths: tuple[int, ...] = (128, 512)
    decode_at: tuple[int, ...] = (128, 1024)
    batch: int = 1
    threads: int | None = None
    provider: str | None = None
    repeats: int = 7


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, interpolated linearly between the values beside them."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Gives median and quartiles of at least one value."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(low), float(median), float(high))


@dataclass(frozen=True)
class Point:
    """One step timed: a prefill of a prompt, or a decode step in a context.

    Attributes:
        kind: prefill or decode.
        length: tokens of the prompt, or positions in the cache before the step.
        tokens: new tokens that a call takes in, all rows together.
        seconds: of one call, a value a round, by the model's label; the rounds are shared.
    """

    kind: Kind
    length: int
    tokens: int
    seconds: Mapping[str, tuple[float, ...]]

    def latency(self, label: str) -> Spread:
        """Gives the seconds of one call of a model."""
        return spread(self.seconds[label])

    def tokens_per_second(self, label: str) -> float:
        """Gives the new tokens of a call over its median seconds."""
        return self.tokens / self.latency(label).median

    def speed_up(self) -> Spread | None:
        """Gives the time of B over the time of A within each round; None without both."""
        if not {"A", "B"} <= self.seconds.keys():
            return None
        pairs = zip(self.seconds["A"], self.seconds["B"], strict=True)
        return spread([b / a for a, b in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Gives the raw times and what follows from them, by name."""
        ratio = self.speed_up()
        return {
            **asdict(self),
            "latency": {label: asdict(self.latency(label)) for label in self.seconds},
            "tokens_per_second": {label: self.tokens_per_second(label) for label in self.seconds},
            "speed_up": None if ratio is None else asdict(ratio),
        }


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process, less those before the session was created.

    ONNX Runtime's own code and arenas, some 15 MB, are among them.

    Attributes:
        held: after one decode step in the longest context, its past and present included.
        peak: the most at any time.
    """

    held: int
    peak: int


@dataclass(frozen=True)
class KernelRow:
    """All nodes of one run that one kernel executed.

    Attributes:
        kernel: the operator as ONNX Runtime executed it, after its fusions.
        provider: the execution provider that it ran on.
        count: nodes.
        seconds: of all of them together.
    """

    kernel: str
    provider: str
    count: int
    seconds: float


@dataclass(frozen=True)
class ModelRow:
    """One model, and what does not vary with the length.

    Attributes:
        file: base name; never a path of this machine.
        bytes: of the file, external data included.
        vocabulary: width of the logits.
        provider: the preferred execution provider.
        layers: with a cache, as the file's inputs say; None without one.
        cache: type of the cached keys and values; None without a cache.
        context_length: positions at most; None where the file does not say.
        memory: None where the system does not tell.
        kernels: of one prefill and of one decode step, by kind, slowest first.
    """

    file: str
    bytes: int
    vocabulary: int
    provider: str
    layers: int | None = None
    cache: str | None = None
    context_length: int | None = None
    memory: Memory | None = None
    kernels: Mapping[Kind, tuple[KernelRow, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        settings: what was asked for.
        models: A, and B where there is one to compare with.
        points: prefill, then decode, each in the order of the settings.
        versions: package to version, Python included.
        machine: what it ran on.
    """

    settings: Settings
    models: Mapping[str, ModelRow]
    points: tuple[Point, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | None]

    def to_json(self) -> str:
        """Gives everything as JSON, times in seconds, sizes in bytes."""
        whole = {**asdict(self), "points": [point.to_dict() for point in self.points]}
        return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)

    def write(self, path: Path) -> None:
        """Writes the JSON to `path`, whole or not at all.

        Raises:
            LoweringError: the file cannot be written.
        """
        write_text_whole(path, self.to_json() + "\n")


def versions() -> dict[str, str]:
    """Gives the versions that speed depends on, ONNX Runtime's whatever its package's name."""
    import onnxruntime

    own = {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
    return {**collect_versions(), **own}


def machine() -> dict[str, str | int | None]:
    """Gives the machine in words: system, processor and number of CPUs."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
    }


def _processor() -> str:
    """Gives the processor's name, which on Linux stands in /proc/cpuinfo alone."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
