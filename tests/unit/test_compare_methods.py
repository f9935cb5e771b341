"""The table of methods: what it holds, how it looks, and that a stopped run goes on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from fptq_compiler.bench.result import Memory
from fptq_compiler.recipe import BUILT_IN

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("compare_methods")


def test_its_recipes_are_built_in(tool: Any) -> None:
    assert {name.removesuffix("+") for name in tool.RECIPES.split(",")} <= set(BUILT_IN)


def test_finished_cells_are_kept_for_the_same_settings(tool: Any, tmp_path: Path) -> None:
    path, made = tmp_path / "methods.json", []

    def make() -> dict[str, float]:
        made.append(len(made))
        return {"perplexity": float(len(made))}

    for _ in range(2):
        results = tool.Results(path, {"tokens": 64})
        assert results.find("rtn", "4-8-8", make) == {"perplexity": 1.0}
    assert len(made) == 1
    assert tool.Results(path, {"tokens": 128}).find("rtn", "4-8-8", make) == {"perplexity": 2.0}
    assert json.loads(path.read_text())["settings"] == {"tokens": 128}


def test_the_whole_table(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def measure(model: Path, calibration: Path, folder: Path, bits: str, options: str) -> Any:
        commands.append(f"{bits} {options}")
        stage = {"seconds": 2.0, "peak_rss_mb": 1200.0, "peak_anonymous_mb": 900.0}
        return {
            "stages": [stage], "online_operations": 4608, "size_after": 7e6,
            "processor_seconds": 3.0, "half_precision": 0, "block": 0,
        }

    found = type("Found", (), {"perplexity": 1234.56})
    monkeypatch.setattr(tool, "measure", measure)
    monkeypatch.setattr(tool, "measure_memory", lambda file, settings: Memory(1, 5_000_000))
    monkeypatch.setattr(tool, "read_model_file", lambda path: path)
    monkeypatch.setattr(tool, "open_model", lambda path, **_: (None, None))
    monkeypatch.setattr(tool, "load_tokenizer", lambda path: path)
    monkeypatch.setattr(tool, "token_stream", lambda *_: None)
    monkeypatch.setattr(tool, "perplexity", lambda *_: found)
    for name in ("m.gguf", "t.txt", "c.txt"):
        (tmp_path / name).touch()
    arguments = [
        str(tmp_path / "m.gguf"), "--text", str(tmp_path / "t.txt"), "--calibration",
        str(tmp_path / "c.txt"), "--folder", str(tmp_path / "out"),
        "--recipes", "rtn,quarot+,spinquant", "--bits", "4-4-4", "--steps", "100",
        "--options", "--samples 16",
    ]
    done = CliRunner().invoke(tool.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert commands == [
        "4-4-4 --recipe rtn --samples 16",
        "4-4-4 --recipe quarot --steps 100 --samples 16",
        "4-4-4 --recipe spinquant --steps 100 --samples 16",
    ]
    rows = (tmp_path / "out" / "methods.md").read_text().splitlines()
    assert rows[1] == "|---|---|---|---|---|---|---|---|"
    assert rows[2] == "| original | 16-16-16 | 1,234.6 |  |  |  |  |  |"
    assert rows[4] == "| quarot+ | 4-4-4 | 1,234.6 | 2 | 1,200 | 5 | 4,608 | 7 |"


@pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
def test_a_peer_rounds_the_float_file(
    tool: Any, tmp_path: Path, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's own quantiser, on a file of two products; only the first becomes INT4."""
    generator = np.random.default_rng(0)
    shapes = (64, 64), (64, 9)
    weights = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    nodes = [
        onnx.helper.make_node("Transpose", ["w0"], ["w"], name="turn"),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="first"),
        onnx.helper.make_node("MatMul", ["y", "w1"], ["z"], name="head"),
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width])
        for name, width in (("x", 64), ("z", 9))
    ]
    tensors = [onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10

    def measure(original: Path, calibration: Path, folder: Path, *words: str) -> None:
        onnx.save(
            model, folder / "out.onnx", save_as_external_data=beside, location="out.onnx.data",
            size_threshold=0,
        )
        (folder / "out.onnx.session.json").write_text("{}")

    monkeypatch.setattr(tool, "measure", measure)
    monkeypatch.setattr(tool, "load_tokenizer", lambda path: path)
    monkeypatch.setattr(tool, "token_stream", lambda *_: torch.arange(8 * 256))
    cell = tool.compressed(tmp_path, tmp_path, tmp_path, tmp_path, "ort-rtn", "")
    assert cell["file_mb"] * 1e6 == (tmp_path / "out.onnx").stat().st_size
    assert not (tmp_path / "out.onnx.session.json").exists()
    assert np.load(tmp_path / "ids.npy").shape == (8, 256)
    kinds = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert kinds == ["MatMulNBits", "MatMul"]
    x = generator.standard_normal((3, 64)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    (found,) = session.run(None, {"x": x})
    exact = x @ weights[0].T @ weights[1]
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0.01 < error < 0.2


def test_a_peer_that_leaves_all_in_float_is_an_error(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of two inputs has no weight: the peer writes a file, which has no INT4."""
    names = ("x", "y", "z", "w")
    values = {
        n: onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", "n"]) for n in names
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "y"], ["z"], name="first"),
        onnx.helper.make_node("MatMul", ["z", "y"], ["w"], name="head"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [values["x"], values["y"]], [values["w"]])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.save(model, tmp_path / "float.onnx")
    peers = importlib.import_module("peers")
    peers.ort_rtn(tmp_path / "float.onnx", tmp_path / "out.onnx", tmp_path / "ids.npy")
    with pytest.raises(ValueError, match="has no INT4 weight"):
        peers.refuse_float(tmp_path / "out.onnx")
