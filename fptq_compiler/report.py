"""What one compilation did: collected on the way, shown at the end, written as JSON.

Rows hold names and numbers, never tensors or nodes, so that a report outlives its program.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.inspection import Unrecognised
from fptq_compiler.stage_clock import StageClock

__all__ = [
    "AuditRow",
    "Histogram",
    "Report",
    "SiteRow",
    "StageClock",
    "StageRow",
    "check_new_file",
    "collect_versions",
    "write_text_whole",
]

PACKAGES: Final = (
    "fptq-compiler",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
)


def collect_versions() -> dict[str, str]:
    """Gives the version of everything that shapes the written file, imported or not."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@dataclass(frozen=True)
class SiteRow:
    """One site that was found.

    Attributes:
        name: with its block's number as a part of its own, for example `blocks.7.attention`.
        kind: residual, attention, mlp, norm, embedding or head.
        shape: what the graph said, in words: heads, widths, the layout of RoPE.
        transforms: those applied (when inspecting: those possible).
        not_applied: for each of the others, why not.
    """

    name: str
    kind: str
    shape: str
    transforms: tuple[str, ...] = ()
    not_applied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRow:
    """One stage: wall-clock seconds, and peak resident memory in megabytes of 10^6 bytes.

    Of it the anonymous part has a peak of its own; the rest are pages of files, which the system
    takes back when it needs them.
    """

    name: str
    seconds: float
    peak_rss_mb: float
    peak_anonymous_mb: float = 0.0


@dataclass(frozen=True)
class AuditRow:
    """One kind of tensor in the written file.

    Attributes:
        kind: what the tensors are for: linear weights, embedding, head, scales, other.
        requested: the type that the recipe asks for, for example INT4.
        written: the type that stands in the file.
        tensors: how many.
        bytes: of all of them together, as stored.
    """

    kind: str
    requested: str
    written: str
    tensors: int
    bytes: int

    @property
    def as_requested(self) -> bool:
        """Whether the file holds what was asked for."""
        return self.requested == self.written


@dataclass(frozen=True)
class Histogram:
    """How the values that enter a linear layer are spread.

    Attributes:
        low, high: the least and largest value; the bins between them are equally wide.
        counts: values in each bin.
        rms: the root of their mean square.
        kurtosis: E[(x - E x)⁴] / Var(x)², 3 for a normal distribution.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    rms: float
    kurtosis: float

    @property
    def peak(self) -> float:
        """The largest magnitude over the root of the mean square; 0 where all values are 0."""
        return max(-self.low, self.high) / self.rms if self.rms > 0.0 else 0.0


@dataclass
class Report:
    """Everything worth knowing about one compilation.

    Attributes:
        origin: base name of the model file or folder; never a path of this machine.
        recipe: as TOML, defaults included.
        seed: of every random draw.
        versions: package to version.
        sites: what was found and done, one row a site, in the order of the graph.
        near_misses: what nearly was a site, one line each: node, reason, source line.
        unrecognised: the parts that no pass understood, and what that means.
        stages: in the order in which they ended.
        curves: loss by step, for each optimisation.
        preserved: relative error of the logits in float64 after each pass that preserves them.
        online_operations: multiply-adds a token of all maps that are computed at run time.
        sqnr: signal-to-noise ratio in dB of every quantiser, by parameter or node name.
        sqnr_stages: the same by stage and place (`weight of`, `input of`, `keys of`, `values of`
            a layer), plain rounding first; empty unless measured.
        histograms: by place and stage, where plain rounding meets the heaviest tails; empty
            unless measured.
        sensitivity: by block, the Jensen-Shannon divergence in nats a token when that block
            alone is quantised; empty unless measured.
        audit: the written file's tensors, by kind.
        size_before: bytes of the parameters as they were read.
        size_after: bytes of the written file, external data included.
        parity: figures of the check against ONNX Runtime.
        decisions: what was chosen where a choice was open, one sentence each.
        tokens_per_second: of the end-to-end training, by its median step.
        perplexity: by the name of what was evaluated; None unless asked for.
    """

    origin: str
    recipe: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=collect_versions)
    sites: list[SiteRow] = field(default_factory=list)
    near_misses: list[str] = field(default_factory=list)
    unrecognised: list[Unrecognised] = field(default_factory=list)
    stages: list[StageRow] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    preserved: dict[str, float] = field(default_factory=dict)
    online_operations: int = 0
    sqnr: dict[str, float] = field(default_factory=dict)
    sqnr_stages: dict[str, dict[str, float]] = field(default_factory=dict)
    histograms: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    audit: list[AuditRow] = field(default_factory=list)
    size_before: int = 0
    size_after: int = 0
    parity: dict[str, float | int | str] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    tokens_per_second: float | None = None
    perplexity: dict[str, float] | None = None

    def stage(self, name: str) -> StageClock:
        """Gives a clock whose row is appended to `stages` when its `with` block ends."""
        return StageClock(name, self.stages)

    def to_json(self) -> str:
        """Writes the report as JSON; numbers that JSON lacks become `inf`, `-inf`, `nan`."""
        return json.dumps(_strict(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)

    def write(self, path: Path) -> None:
        """Writes the JSON to `path`, whole or not at all.

        Raises:
            LoweringError: the file cannot be written.
        """
        write_text_whole(path, self.to_json() + "\n")


def check_new_file(option: str, path: Path, endings: Collection[str]) -> None:
    """Refuse a file name of another ending than an option knows, before any work is done.

    Raises:
        RecipeError: another ending, or a folder that is not there.
    """
    if path.suffix.lower() not in endings:
        message = f"{option} {path}: expected a name that ends with {' or '.join(endings)}"
        raise RecipeError(message)
    if not path.parent.is_dir():
        message = f"{option} {path}: there is no folder {path.parent}"
        raise RecipeError(message)


def write_text_whole(path: Path, text: str) -> None:
    """Writes a text file under a temporary name beside it and moves it when it is whole.

    Raises:
        LoweringError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        message = f"{path}: cannot write it: {error.strerror or error}"
        raise LoweringError(message) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _strict(value: object) -> object:
    """Gives the same value with only what strict JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(entry) for entry in value]
    return value
