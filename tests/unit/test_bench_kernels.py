"""Profiles are split into runs and added up by kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fptq_compiler.bench.kernels import kernels_of, profile_steps, runs_of
from fptq_compiler.bench.result import KernelRow, Settings
from fptq_compiler.bench.run import kernels_of_model
from fptq_compiler.runtime.model_file import read_model_file
from tests.cached_model import LAYERS, write_cached_model

CPU = "CPUExecutionProvider"
RUN = {"cat": "Session", "name": "model_run", "dur": 99, "args": {}}


def node(kernel: str, microseconds: int, provider: str = CPU) -> dict[str, Any]:
    arguments = {"op_name": kernel, "provider": provider}
    return {
        "cat": "Node",
        "name": f"{kernel}_1_kernel_time",
        "dur": microseconds,
        "args": arguments,
    }


class StubSession:
    """A session whose profile is given."""

    def __init__(self, path: Path, events: list[dict[str, Any]]) -> None:
        path.write_text(json.dumps(events), encoding="utf-8")
        self._path = path

    def end_profiling(self) -> str:
        return str(self._path)


def test_a_profile_is_split_at_its_runs() -> None:
    events = [
        {"cat": "Session", "name": "session_initialization", "dur": 5, "args": {}},
        node("MatMul", 3),
        {"cat": "Node", "name": "MatMul_1_fence_before", "dur": 7, "args": {"op_name": "MatMul"}},
        {"cat": "Session", "name": "SequentialExecutor::Execute", "dur": 3, "args": {}},
        RUN,
        node("Add", 1),
        node("Mul", 2),
        RUN,
    ]
    names = [[entry["args"]["op_name"] for entry in run] for run in runs_of(events)]
    assert names == [["MatMul"], ["Add", "Mul"]]


def test_kernels_are_added_up_slowest_first() -> None:
    nodes = [node("Add", 4), node("MatMul", 3), node("MatMul", 2), node("MatMul", 1, "Other")]
    assert kernels_of(nodes) == (
        KernelRow("MatMul", CPU, 2, pytest.approx(5e-6)),
        KernelRow("Add", CPU, 1, pytest.approx(4e-6)),
        KernelRow("MatMul", "Other", 1, pytest.approx(1e-6)),
    )


def test_the_second_run_of_each_step_is_read(tmp_path: Path) -> None:
    runs = ("opening", "prefill cold", "prefill warm", "decode cold", "decode warm")
    events = [event for name in runs for event in (node(name, 1), RUN)]
    called: list[str] = []
    found = profile_steps(
        StubSession(tmp_path / "profile.json", events),
        {"prefill": lambda: called.append("prefill"), "decode": lambda: called.append("decode")},
    )
    assert called == ["prefill", "prefill", "decode", "decode"]
    assert {kind: rows[0].kernel for kind, rows in found.items()} == {
        "prefill": "prefill warm",
        "decode": "decode warm",
    }


def test_a_branch_is_counted_once(tmp_path: Path) -> None:
    """ONNX Runtime gives the time of an If twice: as its own and as that of its body."""

    def body(kernel: str) -> onnx.GraphProto:
        nodes = [helper.make_node(kernel, ["x"], [kernel])]
        outputs = [helper.make_tensor_value_info(kernel, TensorProto.FLOAT, ["N"])]
        return helper.make_graph(nodes, kernel, [], outputs)

    branch = helper.make_node(
        "If", ["choice"], ["y"], then_branch=body("Sin"), else_branch=body("Cos")
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"]),
        helper.make_tensor_value_info("choice", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])]
    graph = helper.make_graph([branch], "branch", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"x": np.ones(8, np.float32), "choice": np.array(True)}
    found = profile_steps(session, {"prefill": lambda: session.run(None, feeds)})
    assert [(row.kernel, row.count) for row in found["prefill"]] == [("Sin", 1)]


def test_a_real_profile_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    found = kernels_of_model(file, Settings(prompt_lengths=(4,), decode_at=(8,), threads=1))
    assert set(found) == {"prefill", "decode"}
    for rows in found.values():
        counts = {row.kernel: row.count for row in rows}
        assert counts["Softmax"] == LAYERS
        assert {row.provider for row in rows} == {CPU}
        assert all(row.seconds >= 0 for row in rows)
    assert list(temporary.iterdir()) == []


def test_a_model_without_a_cache_has_no_decode_step(tmp_path: Path) -> None:
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", None))
    assert set(kernels_of_model(file, Settings(prompt_lengths=(4,), threads=1))) == {"prefill"}
