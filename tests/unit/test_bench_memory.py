"""Memory is measured in a process of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fptq_compiler.bench import memory
from fptq_compiler.bench.memory import measure_memory, resident_bytes
from fptq_compiler.bench.result import Settings
from fptq_compiler.errors import RuntimeLoadError
from fptq_compiler.runtime.model_file import ModelFile, read_model_file
from tests.cached_model import write_cached_model

ROWS, WIDTH = 1 << 15, 1 << 10
SETTINGS = Settings(decode_at=(8,), threads=1)
MIB = 1 << 20

needs_proc = pytest.mark.skipif(
    resident_bytes("VmRSS") is None, reason="there is no /proc that tells resident memory"
)


@needs_proc
def test_a_session_holds_its_weights(tmp_path: Path) -> None:
    table = np.ones((ROWS, WIDTH), np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", WIDTH])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "table.onnx"
    onnx.save(model, path)
    found = measure_memory(read_model_file(path), SETTINGS)
    assert found is not None
    # 128 MiB of weights, once when held; ONNX Runtime reads them from a copy of the file.
    assert 128 * MIB <= found.held < 2 * 128 * MIB
    assert found.held <= found.peak < 4 * 128 * MIB


@needs_proc
def test_a_small_model_with_a_cache_holds_little(tmp_path: Path) -> None:
    ballast = np.ones(128 * MIB, np.uint8)  # of this process, which is not the measured one
    found = measure_memory(
        read_model_file(write_cached_model(tmp_path / "m.onnx", "int8")), SETTINGS
    )
    assert found is not None
    assert 0 < found.held <= found.peak < 64 * MIB < ballast.nbytes


def test_an_error_of_the_process_is_ours(tmp_path: Path) -> None:
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    gone = replace(file, path=tmp_path / "gone.onnx")
    with pytest.raises(RuntimeLoadError, match=r"gone\.onnx: ONNX Runtime .* cannot open it"):
        measure_memory(gone, SETTINGS)


def _die(file: ModelFile, settings: Settings) -> None:
    os._exit(9)


def test_a_process_that_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of_session", _die)
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    with pytest.raises(RuntimeLoadError, match="was ended from outside"):
        measure_memory(file, SETTINGS)


def test_without_proc_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nowhere")
    assert resident_bytes("VmRSS") is None
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    assert memory.memory_of_session(file, SETTINGS) is None
