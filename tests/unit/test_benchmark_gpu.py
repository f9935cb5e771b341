"""The command that checks a GPU, on a CPU with a tiny model; and the floors that it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from rich.console import Console

from fptq_compiler.bench import against_floor, operators
from fptq_compiler.bench.devices import Device, device_of, gpu_name
from fptq_compiler.bench.floors import least_seconds, weights_of
from fptq_compiler.bench.operators import CachedAttention, Matmul, step_of
from fptq_compiler.bench.placement import misplaced
from fptq_compiler.bench.result import KernelRow, Settings
from fptq_compiler.errors import LoweringError, RecipeError, RuntimeLoadError
from fptq_compiler.progress import SilentProgress
from fptq_compiler.runtime.model_file import read_model_file
from tests.cached_model import HIDDEN, KV_HEADS, LAYERS, VOCABULARY, write_cached_model

FLOAT32 = np.dtype("float32")
CPU = Settings(provider="cpu", threads=1)
SLOW = Device("slow", bandwidth=1e3, float16=1e5, int8=1e6)


# The command.

LIMITS = ["--bandwidth", "20", "--tops", "0.1", "--int8-tops", "0.4"]
WORDS = [
    "--tiny", "--provider", "cpu", "--target", "ort-cpu", "--threads", "1", "--repeats", "1",
    "--settings", "4-16-8", "--prompt-lengths", "4", "--decode-at", "16", "--rows", "1,32",
]


@pytest.fixture
def tool(load_tool: Callable[[str], Any]) -> Any:
    return load_tool("benchmark_gpu")


def test_every_figure_stands_beside_its_floor(tool: Any, tmp_path: Path) -> None:
    """One file is there already and one is compiled; every path runs but those of a GPU."""
    folder, found = tmp_path / "files", tmp_path / "gpu.json"
    folder.mkdir()
    write_cached_model(folder / "16-16-16.onnx", "float32")
    words = [*WORDS, *LIMITS, "--folder", str(folder), "--json", str(found)]
    shown = CliRunner().invoke(tool.main, words)
    assert shown.exit_code == 0, shown.output
    whole = json.loads(found.read_text())
    labels = ["16-16-16", "4-16-8", "4-16-8, fpA_intB"]
    assert list(whole["checks"]) == labels
    assert whole["checks"]["16-16-16"] == {"elsewhere": [], "apart": None, "same": None}
    for label in labels[1:]:
        assert 0 < whole["checks"][label]["apart"] < 1e-2  # a code at a tie may flip
        assert whole["checks"][label]["same"] == 1.0
    rows = whole["rows"]
    models = {(r["what"], r["form"]) for r in rows if r["form"] in labels}
    assert models == {(w, label) for w in ("prefill 4", "decode 16") for label in labels}
    assert len(rows) == 2 * 3 + 2 * 3 + 2 * 4  # models, attention, matmuls
    assert all(row["seconds"] > 0 and row["floor"] > 0 for row in rows)
    assert {r["faster"] for r in rows if r["form"] in ("16-16-16", "float32")} == {1.0}
    assert "4-16-8, fpA_intB" in shown.output
    assert sorted(p.name for p in folder.glob("4-16-8*")) == [
        "4-16-8.npz", "4-16-8.onnx", "4-16-8.onnx.session.json"
    ]


def test_what_it_needs_to_be_told(tool: Any) -> None:
    def refusal(*words: str) -> str:
        shown = CliRunner().invoke(tool.main, [*words])
        assert shown.exit_code == 2
        return shown.output

    assert "give MODEL, or --tiny" in refusal()
    assert "give --bandwidth" in refusal("--tiny", "--provider", "cpu", "--tops", "1")
    assert "TPU is not available" in refusal("--tiny", "--provider", "TPU", *LIMITS)


def test_a_file_that_ran_elsewhere_fails(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cached_model(tmp_path / "16-16-16.onnx", "float32")
    monkeypatch.setattr(tool, "misplaced", lambda rows, provider: ["3 MemcpyToHost"])
    words = [*WORDS, *LIMITS, "--folder", str(tmp_path), "--settings", "16-16-16"]
    shown = CliRunner().invoke(tool.main, words)
    assert shown.exit_code == 1
    assert "decode: 3 MemcpyToHost" in shown.output
    assert "ran elsewhere, or gave no numbers: 16-16-16" in shown.output


def test_a_setting_that_cannot_be_had_does_not_stop_the_others(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(model: Path, folder: Path, bits: str, **rest: object) -> Any:
        if bits == "4-4-4":
            message = "no such cache"
            raise LoweringError(message)
        return read_model_file(write_cached_model(folder / f"{bits}.onnx", "float32"))

    monkeypatch.setattr(tool, "compiled", compiled)
    words = [*WORDS, *LIMITS, "--folder", str(tmp_path), "--settings", "4-4-4,4-8-16"]
    shown = CliRunner().invoke(tool.main, words)
    assert shown.exit_code == 1
    assert "error: no such cache" in shown.output
    assert "gave no numbers: 4-4-4\n" in shown.output
    lines = [line for line in shown.output.splitlines() if "decode 16" in line]
    assert any("4-8-16" in line for line in lines)


def test_a_provider_without_the_kernel_has_no_figure(
    tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_of(model: onnx.ModelProto, *rest: Any) -> Any:
        if model.graph.node[0].op_type == "MatMulInteger":
            message = "no kernel"
            raise RuntimeLoadError(message)
        return operators.step_of(model, *rest)

    monkeypatch.setattr(against_floor, "step_of", step_of)
    settings = Settings(provider="cpu", threads=1, repeats=1)
    shape = (1, 64, 96)
    rows = list(
        against_floor.matmul_rows(shape, FLOAT32, settings, SLOW, SilentProgress(), 1)
    )
    assert [row.seconds is None for row in rows] == [False, True, False, False]
    console = Console(width=100)
    with console.capture() as shown:
        console.print(tool.speed_table(rows, SLOW))
    assert "no kernel" in shown.get()


def test_logits_that_are_no_numbers_fail(tool: Any) -> None:
    assert tool.Check((), 0.1, 0.5).good
    assert not tool.Check((), float("nan"), 0.5).good
    assert not tool.Check(("decode: 1 MatMul on CPU",)).good


# Placement.


def test_what_ran_elsewhere() -> None:
    cuda = "CUDAExecutionProvider"
    rows = [
        KernelRow("MatMulNBits", cuda, 8, 1.0),
        KernelRow("MatMul", "CPUExecutionProvider", 2, 1.0),
        KernelRow("MemcpyToHost", cuda, 1, 1.0),
        KernelRow("Shape", "CPUExecutionProvider", 4, 1.0),  # sizes are reckoned there
    ]
    assert misplaced(rows, cuda) == ["2 MatMul on CPU", "1 MemcpyToHost"]
    assert misplaced(rows[:1], cuda) == []


# Devices and floors.


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3938),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA L4", 300),
        ("NVIDIA GeForce RTX 4090", 1008),
    ],
)
def test_known_devices(name: str, gigabytes: float) -> None:
    found = device_of(name, None, None, None)
    assert found.bandwidth == gigabytes * 1e9
    assert 1.9 < found.int8 / found.float16 < 4.1
    assert device_of(name, 1.0, None, None).bandwidth == 1e9


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA GeForce RTX 4090 Laptop GPU", "CPU"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{name}: its limits are not known here \(known are"):
        device_of(name, 1.0, 2.0, None)
    assert device_of(name, 1.0, 2.0, 3.0) == Device(name, 1e9, 2e12, 3e12)


def test_without_nvidia_smi_it_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_name() == "CPU"


def test_the_floor_is_the_slower_of_memory_and_matmuls() -> None:
    assert SLOW.floor(2e3, 1e5, integer=False) == 2.0
    assert SLOW.floor(2e3, 4e5, integer=False) == 4.0
    assert SLOW.floor(2e3, 4e5, integer=True) == 2.0


@pytest.mark.parametrize(("cache", "bytes_of_one"), [("float32", 4), ("int8", 1), ("int4", 0.5)])
def test_the_floor_of_a_model(tmp_path: Path, cache: str, bytes_of_one: float) -> None:
    """Its matmuls read a head and five projections a layer; tables are gathered, not read."""
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", cache))
    weights = weights_of(file)
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * 6
    assert weights.count == HIDDEN * VOCABULARY + LAYERS * layer
    assert (weights.bytes, weights.integer) == (4 * weights.count, False)
    cached = 2 * LAYERS * KV_HEADS * 11 * 6 * bytes_of_one
    expected = SLOW.floor(weights.bytes + cached, 2 * weights.count, integer=False)
    assert least_seconds(file, SLOW, 1, 10) == pytest.approx(expected, rel=1e-12)


# Operators.


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, feeds))


@pytest.mark.parametrize("form", ["MatMul", "MatMulInteger", "MatMulNBits"])
def test_a_matmul_is_what_it_says(form: Any) -> None:
    case = Matmul(form, 3, 64, 96, FLOAT32)
    model = case.model(streamed=2 * case.weight_bytes)
    assert case.copies(2 * case.weight_bytes) == len(model.graph.output) == 2
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    stored = sum(w.nbytes for name, w in weights.items() if name.startswith("w0"))
    assert stored == case.weight_bytes
    x = case.feeds()["x"]
    found = run(model, case.feeds())
    assert not np.array_equal(found[0], found[1])
    if form == "MatMulNBits":
        packed, scale = weights["w0"], weights["w0_scale"].reshape(96, 2, 1)
        codes = np.stack((packed & 15, packed >> 4), -1).reshape(96, 2, 32).astype(np.float32) - 8
        expected = x @ (codes * scale).reshape(96, 64).T
    else:
        wide = np.int32 if form == "MatMulInteger" else np.float32
        expected = x.astype(wide) @ weights["w0"].astype(wide)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)
    step_of(model, case.feeds(), CPU, {})()


def test_few_rows_stream_and_many_do_not() -> None:
    weight = 4 * 64 * 96
    assert Matmul("MatMul", 16, 64, 96, FLOAT32).copies(weight * 5 + 1) == 6
    assert Matmul("MatMul", 17, 64, 96, FLOAT32).copies(weight * 5 + 1) == 1
    assert Matmul("MatMul", 1, 64, 96, FLOAT32).copies(weight * 99) == 32
    assert Matmul("MatMul", 3, 64, 96, FLOAT32).operations == 2 * 3 * 64 * 96


@pytest.mark.parametrize("cache", ["float32", "int8", "int4"])
def test_attention_grows_its_cache(cache: str) -> None:
    case = CachedAttention(cache, 1, 7, 4, 2, 16, FLOAT32)
    feeds = case.feeds()
    y, key, value = run(case.model(), feeds)
    assert y.shape == (1, 1, 64)
    assert np.isfinite(y).all()
    assert key.nbytes + value.nbytes == case.cache_bytes
    assert np.array_equal(key[:, :, :7], feeds["past_k"])
    assert case.operations == 4 * 4 * 16 * 8  # one query sees seven cached keys and its own
    step_of(case.model(), feeds, CPU, {})()
