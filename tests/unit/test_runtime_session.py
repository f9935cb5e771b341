"""Opening a model: session file, external data, signature, providers, and what is refused."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from fptq_compiler.errors import LoweringError, RuntimeLoadError
from fptq_compiler.runtime import load, session_file
from fptq_compiler.runtime.session import available_providers, session_options
from fptq_compiler.runtime.session_file import SessionFile, session_path, write_session_file
from tests.cached_model import CACHE_TYPES, LAYERS, VOCABULARY, write_cached_model

FULL = SessionFile(
    target="ort-cpu",
    providers=("CPUExecutionProvider",),
    session_config={"session.x": "1"},
    context_length=40,
    bos_token_id=1,
    eos_token_ids=(2, 3),
    arithmetic="in words",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_cached_model(tmp_path / "tiny.onnx", "float32")


def change(path: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """Change a model's proto, leaving its external data where it is."""
    proto = onnx.load(path, load_external_data=False)
    edit(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def test_the_session_file_is_the_contract(tmp_path: Path) -> None:
    path = write_session_file(tmp_path / "out.onnx", FULL)
    assert path == tmp_path / "out.onnx.session.json"
    assert json.loads(path.read_text()) == {
        "format": 1,
        "target": "ort-cpu",
        "providers": ["CPUExecutionProvider"],
        "session_config": {"session.x": "1"},
        "context_length": 40,
        "bos_token_id": 1,
        "eos_token_ids": [2, 3],
        "arithmetic": "in words",
    }
    assert SessionFile.read(tmp_path / "out.onnx") == FULL


def test_the_session_file_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(session_file.__file__).read_text(encoding="utf-8"))
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    allowed = {*sys.stdlib_module_names, "fptq_compiler.errors"}
    assert {str(name) for name in names} - allowed == {"collections.abc"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON file"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "format None, this version reads format 1"),
        ('{"format": 2}', "format 2, this version reads format 1"),
        ('{"format": 1, "provider": "x"}', "unknown key 'provider'"),
        ('{"format": 1, "target": 3}', "target is 3, expected a string"),
        ('{"format": 1, "providers": []}', "expected a list of strings, at least one"),
        ('{"format": 1, "session_config": {"a": 1}}', "expected an object of strings"),
        ('{"format": 1, "context_length": 0}', "expected a positive integer or null"),
        ('{"format": 1, "bos_token_id": -1}', "expected a token id or null"),
        ('{"format": 1, "eos_token_ids": [true]}', "expected a list of token ids"),
    ],
)
def test_a_wrong_session_file_is_refused(model: Path, content: str, message: str) -> None:
    session_path(model).write_text(content, encoding="utf-8")
    with pytest.raises(RuntimeLoadError, match=message) as caught:
        load(model)
    assert session_path(model).name in str(caught.value)


def test_a_session_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="cannot write"):
        write_session_file(tmp_path / "nowhere" / "out.onnx", FULL)


def test_without_a_session_file_the_defaults_hold(model: Path) -> None:
    settings = load(model, threads=1).settings
    assert settings == SessionFile()
    assert (settings.target, settings.context_length) == ("qdq", None)


def test_without_a_session_file_the_target_is_the_models(tmp_path: Path) -> None:
    path = write_cached_model(tmp_path / "m.onnx", None, metadata={"fptq.target": "ort-cpu"})
    assert load(path, threads=1).settings.target == "ort-cpu"


def test_the_session_files_target_must_be_the_models(tmp_path: Path) -> None:
    path = write_cached_model(tmp_path / "m.onnx", None, metadata={"fptq.target": "qdq"})
    write_session_file(path, FULL)
    with pytest.raises(RuntimeLoadError, match=r"for the target ort-cpu, but m\.onnx is for qdq"):
        load(path)


def test_the_session_file_reaches_the_session(tmp_path: Path) -> None:
    path = write_cached_model(tmp_path / "m.onnx", "int8", metadata={"fptq.target": "ort-cpu"})
    write_session_file(path, FULL)
    model = load(path, threads=1)
    assert model.context_length == 40
    options = session_options(FULL.session_config, threads=3)
    assert options.get_session_config_entry("session.x") == "1"
    assert options.intra_op_num_threads == 3


@pytest.mark.parametrize("cache", [None, *CACHE_TYPES])
def test_a_model_says_what_it_is(tmp_path: Path, cache: str | None) -> None:
    model = load(write_cached_model(tmp_path / "m.onnx", cache), threads=1)
    assert (model.has_cache, model.cache_type) == (cache is not None, cache)
    assert model.layers == (LAYERS if cache else 0)
    assert model.vocabulary == VOCABULARY


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeLoadError, match=r"absent\.onnx: no such file"):
        load(tmp_path / "absent.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x00" * 100])
def test_not_an_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(RuntimeLoadError, match=r"m\.onnx: not an ONNX file"):
        load(path)


def test_a_truncated_onnx_file(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(RuntimeLoadError, match="not an ONNX file, or a truncated one"):
        load(model)


def test_a_provider_that_is_not_there(model: Path) -> None:
    with pytest.raises(RuntimeLoadError, match=r"available: .*CPUExecutionProvider"):
        load(model, provider="abacus")
    write_session_file(model, SessionFile(providers=("AbacusExecutionProvider",)))
    with pytest.raises(RuntimeLoadError, match="AbacusExecutionProvider is not available"):
        load(model)
    load(model, provider="CPU", threads=1)


def test_providers_have_short_names() -> None:
    assert available_providers(["cpu"]) == ["CPUExecutionProvider"]
    assert available_providers(["CPUExecutionProvider"]) == ["CPUExecutionProvider"]


def test_a_provider_that_falls_back_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)

    class OnCpu:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnCpu)
    with pytest.raises(RuntimeLoadError, match="fell back to CPUExecutionProvider"):
        load(model, provider="cuda")


def test_what_onnx_runtime_refuses(model: Path) -> None:
    def unknown_operator(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].op_type = "NoSuchOperator"

    with pytest.raises(RuntimeLoadError, match=r"(?s)cannot open it with .*NoSuchOperator"):
        load(change(model, unknown_operator), threads=1)


class TestExternalData:
    @pytest.fixture
    def external(self, tmp_path: Path) -> Path:
        return write_cached_model(tmp_path / "big.onnx", "int8", external=True)

    def test_it_runs_as_with_its_weights_inside(self, external: Path, tmp_path: Path) -> None:
        outside = load(external, threads=1)
        inside = load(write_cached_model(tmp_path / "small.onnx", "int8"), threads=1)
        found, _ = outside.step([[1, 2, 3]], outside.start(1))
        expected, _ = inside.step([[1, 2, 3]], inside.start(1))
        assert np.array_equal(found, expected)

    def test_a_truncated_file(self, external: Path) -> None:
        data = external.with_name("big.onnx.data")
        data.write_bytes(data.read_bytes()[:-1])
        size = data.stat().st_size
        with pytest.raises(RuntimeLoadError, match=rf"big\.onnx\.data: {size} bytes, but tensor"):
            load(external)

    def test_a_missing_file(self, external: Path) -> None:
        external.with_name("big.onnx.data").unlink()
        with pytest.raises(RuntimeLoadError, match=r"big\.onnx\.data: no such file"):
            load(external)

    @pytest.mark.parametrize("place", ["/etc/passwd", "../big.onnx.data"])
    def test_a_file_outside_of_the_folder(self, external: Path, place: str) -> None:
        self.set_entry(external, "location", place)
        with pytest.raises(RuntimeLoadError, match="outside of the model's folder"):
            load(external)

    def test_a_length_that_is_not_the_shapes(self, external: Path) -> None:
        self.set_entry(external, "length", "4")
        with pytest.raises(RuntimeLoadError, match="the model gives it 4 bytes"):
            load(external)

    @staticmethod
    def set_entry(path: Path, key: str, value: str) -> None:
        def edit(proto: onnx.ModelProto) -> None:
            tensor = next(t for t in proto.graph.initializer if t.external_data)
            next(e for e in tensor.external_data if e.key == key).value = value

        change(path, edit)


def _rename_logits(proto: onnx.ModelProto) -> None:
    proto.graph.node[-1].output[0] = proto.graph.output[0].name = "scores"


def _element(value: onnx.ValueInfoProto, kind: int) -> None:
    value.type.tensor_type.elem_type = kind


def _free_heads(proto: onnx.ModelProto) -> None:
    proto.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "H"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_rename_logits, "missing: logits"),
        (lambda p: p.graph.input.pop(), r"missing: past_key_values\.1\.value"),
        (lambda p: p.graph.output.pop(), r"missing: present\.1\.value"),
        (lambda p: setattr(p.graph.input[0], "name", "pixels"), "do not belong: pixels"),
        (lambda p: _element(p.graph.input[0], TensorProto.INT32), "input_ids is INT32"),
        (lambda p: _element(p.graph.input[2], TensorProto.INT8), "KV cache is of FLOAT, INT8"),
        (_free_heads, "no fixed number of heads"),
    ],
)
def test_a_model_that_is_not_of_the_contract(
    model: Path, edit: Callable[[onnx.ModelProto], Any], message: str
) -> None:
    with pytest.raises(RuntimeLoadError, match=message) as caught:
        load(change(model, edit))
    assert str(caught.value).startswith("tiny.onnx: ")


def test_the_only_input_may_have_any_name(tmp_path: Path) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].name = "tokens"
        for node in proto.graph.node:
            for index, name in enumerate(node.input):
                if name == "input_ids":
                    node.input[index] = "tokens"

    model = load(change(write_cached_model(tmp_path / "m.onnx", None), rename), threads=1)
    logits, _ = model.step([[1, 2]], model.start(1))
    assert logits.shape == (1, 2, VOCABULARY)
