"""What follows from raw times, and the JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fptq_compiler.bench.result import (
    Benchmark,
    KernelRow,
    Memory,
    ModelRow,
    Point,
    Settings,
    Spread,
    machine,
    spread,
    versions,
)
from fptq_compiler.errors import LoweringError


def test_quartiles_are_interpolated() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(1.75, 2.5, 3.25)
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_the_speed_up_is_the_median_of_the_ratios_within_rounds() -> None:
    # The second round ran on a machine four times slower: the ratios do not show it.
    point = Point("decode", 8, 1, {"A": (1.0, 4.0, 1.0), "B": (2.0, 8.0, 3.0)})
    assert point.speed_up() == Spread(2.0, 2.0, 2.5)
    # The ratio of the medians would be 3.
    assert point.latency("B").median / point.latency("A").median == 3.0


def test_without_both_there_is_no_speed_up() -> None:
    assert Point("decode", 8, 1, {"A": (1.0,)}).speed_up() is None
    assert Point("decode", 8, 1, {"B": (1.0,)}).speed_up() is None


def test_tokens_per_second() -> None:
    point = Point("prefill", 64, 128, {"A": (0.25, 0.5, 4.0)})
    assert point.tokens_per_second("A") == 256.0


def example() -> Benchmark:
    kernel = KernelRow("MatMul", "CPUExecutionProvider", 3, 0.25)
    return Benchmark(
        Settings(prompt_lengths=(4,), decode_at=(8,), threads=1),
        {
            "A": ModelRow("a.onnx", 10, 23, "CPU", 2, "int8", 64, Memory(5, 6)),
            "B": ModelRow("b.onnx", 40, 23, "CPU", kernels={"prefill": (kernel,)}),
        },
        (
            Point("prefill", 4, 4, {"A": (0.1, 0.3), "B": (0.2, 0.4)}),
            Point("decode", 8, 1, {"A": (0.1, 0.7)}),
        ),
        versions(),
        machine(),
    )


def test_the_json_holds_everything(tmp_path: Path) -> None:
    result = example()
    path = tmp_path / "bench.json"
    result.write(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = {
        key: tuple(v) if isinstance(v, list) else v for key, v in found["settings"].items()
    }
    assert Settings(**settings) == result.settings
    assert Memory(**found["models"]["A"]["memory"]) == result.models["A"].memory
    assert found["models"]["B"]["memory"] is None
    assert (
        KernelRow(**found["models"]["B"]["kernels"]["prefill"][0])
        == (result.models["B"].kernels["prefill"][0])
    )
    for entry, point in zip(found["points"], result.points, strict=True):
        raw = {label: tuple(values) for label, values in entry["seconds"].items()}
        assert Point(entry["kind"], entry["length"], entry["tokens"], raw) == point
    assert Spread(**found["points"][0]["speed_up"]) == result.points[0].speed_up()
    assert found["points"][0]["latency"]["B"] == asdict(result.points[0].latency("B"))
    assert found["points"][1]["speed_up"] is None
    assert found["versions"]["onnxruntime"][0].isdigit()
    assert found["machine"]["cpus"] >= 1
    assert found["machine"]["processor"]


def test_json_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="cannot write it"):
        example().write(tmp_path / "nowhere" / "bench.json")
