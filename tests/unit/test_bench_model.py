"""Steps bind what they say: shapes, types, values, and outputs that grow the cache by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_compiler.bench.model import open_model, random_past
from fptq_compiler.errors import RuntimeInputError, RuntimeLoadError
from fptq_compiler.runtime.model_file import read_model_file
from tests.cached_model import (
    CACHE_TYPES,
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    write_cached_model,
)


class SpySession:
    """A session that keeps the bindings which it makes."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.bindings: list[Any] = []

    def io_binding(self) -> Any:
        self.bindings.append(self._session.io_binding())
        return self.bindings[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_a_decode_step_reads_the_whole_past(tmp_path: Path, cache: str) -> None:
    model = open_model(read_model_file(write_cached_model(tmp_path / "m.onnx", cache)), threads=1)
    spy = model.session = SpySession(model.session)
    model.step(batch=2, tokens=1, past=5)()
    logits, *present = [value.numpy() for value in spy.bindings[-1].get_outputs()]
    past = random_past(model.file.signature, 2, 5)
    assert logits.shape == (2, 1, VOCABULARY)
    assert len(present) == 2 * LAYERS
    for new, old in zip(present, past.values(), strict=True):
        assert new.shape[2] == 6
        np.testing.assert_array_equal(new[:, :, :5], old)


def test_prefill_begins_with_an_empty_cache(tmp_path: Path) -> None:
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    model = open_model(file, threads=1)
    spy = model.session = SpySession(model.session)
    model.step(batch=1, tokens=7, past=0)()
    shapes = [value.shape() for value in spy.bindings[-1].get_outputs()]
    assert shapes == [[1, 7, VOCABULARY], *[[1, KV_HEADS, 7, HEAD_SIZE]] * (2 * LAYERS)]


def test_a_model_without_a_cache(tmp_path: Path) -> None:
    model = open_model(read_model_file(write_cached_model(tmp_path / "m.onnx", None)), threads=1)
    assert not model.has_cache
    assert model.vocabulary == VOCABULARY
    spy = model.session = SpySession(model.session)
    model.step(batch=1, tokens=7, past=0)()
    assert [value.shape() for value in spy.bindings[-1].get_outputs()] == [[1, 7, VOCABULARY]]


@pytest.mark.parametrize(
    ("cache", "dtype", "low", "high"),
    [("int8", np.int8, -128, 127), ("int4", np.uint8, 0, 255), ("float16", np.float16, -9, 9)],
)
def test_a_random_past(tmp_path: Path, cache: str, dtype: type, low: int, high: int) -> None:
    signature = read_model_file(write_cached_model(tmp_path / "m.onnx", cache)).signature
    past = random_past(signature, batch=3, positions=400)
    assert list(past) == list(signature.past_names)
    width = HEAD_SIZE // 2 if cache == "int4" else HEAD_SIZE
    values = np.stack(list(past.values()))
    assert values.shape == (2 * LAYERS, 3, KV_HEADS, 400, width)
    assert values.dtype == dtype
    assert values.min() >= low
    assert values.max() <= high
    if values.dtype.kind != "f":
        assert (values.min(), values.max()) == (low, high)
    assert not np.array_equal(values[0], values[1])


def test_a_failure_of_a_step_names_the_model(tmp_path: Path) -> None:
    model = open_model(read_model_file(write_cached_model(tmp_path / "m.onnx", "int8")), threads=1)
    step = model.step(batch=1, tokens=1, past=POSITIONS)  # one more than its table of positions
    with pytest.raises(RuntimeInputError, match=r"m\.onnx: ONNX Runtime failed on it: .*Gather"):
        step()


def test_a_provider_that_is_not_there(tmp_path: Path) -> None:
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    with pytest.raises(RuntimeLoadError, match="abacus is not available"):
        open_model(file, "abacus")


def test_a_file_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    file = read_model_file(write_cached_model(tmp_path / "m.onnx", "int8"))
    gone = replace(file, path=tmp_path / "gone.onnx")
    with pytest.raises(RuntimeLoadError, match="cannot open it with CPUExecutionProvider"):
        open_model(gone)
