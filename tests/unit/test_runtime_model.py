"""One step of a model: decoding equals the whole sequence at once, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from fptq_compiler.errors import RuntimeInputError
from fptq_compiler.runtime.model import Cache, Model
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile, write_session_file
from tests.cached_model import (
    CACHE_TYPES,
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    write_cached_model,
)

CLOSE = 1e-5
"""Logits are about 5; a sum of 24 products in float32 differs by 1e-6 in another order."""


def open_model(folder: Path, cache: str | None, context: int | None = None) -> Model:
    path = write_cached_model(folder / f"{cache}.onnx", cache)
    write_session_file(path, SessionFile(context_length=context))
    return load(path, threads=1)


def random_ids(seed: int, *shape: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(VOCABULARY, size=shape)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return open_model(tmp_path, "int8", context=8)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize("parts", [(9,), (4, 1, 1, 3), (1,) * 9])
def test_decoding_equals_the_whole_sequence(
    tmp_path: Path, seed: int, cache_type: str, parts: tuple[int, ...]
) -> None:
    model = open_model(tmp_path, cache_type)
    ids = random_ids(seed, 2, 9)
    whole, _ = model.step(ids, model.start(2))
    cache, found, first = model.start(2), [], 0
    for part in parts:
        logits, cache = model.step(ids[:, first : first + part], cache)
        found.append(logits)
        first += part
    assert np.abs(np.concatenate(found, axis=1) - whole).max() < CLOSE
    assert (whole.dtype, whole.shape) == (np.float32, (2, 9, VOCABULARY))
    assert cache.length == 9


def test_the_float_cache_equals_no_cache(tmp_path: Path, seed: int) -> None:
    ids = random_ids(seed, 3, 7)
    plain, cached = open_model(tmp_path, None), open_model(tmp_path, "float32")
    expected, _ = plain.step(ids, plain.start(3))
    found, _ = cached.step(ids, cached.start(3))
    assert np.abs(found - expected).max() < CLOSE


@pytest.mark.parametrize("position", range(4))
def test_each_cached_token_is_read(model: Model, seed: int, position: int) -> None:
    """The check above would be empty if the logits did not depend on the cache."""
    ids = random_ids(seed, 1, 5)
    other = ids.copy()
    other[0, position] = (other[0, position] + 1) % VOCABULARY
    last = []
    for sequence in (ids, other):
        _, cache = model.step(sequence[:, :4], model.start(1))
        logits, _ = model.step(ids[:, 4:], cache)
        last.append(logits)
    assert np.abs(last[0] - last[1]).max() > 1e-3


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_padding_on_the_left_changes_nothing(tmp_path: Path, seed: int, cache_type: str) -> None:
    model = open_model(tmp_path, cache_type)
    long, short = random_ids(seed, 1, 6), random_ids(seed + 1, 1, 4)
    ids = np.concatenate([long, np.concatenate([np.zeros((1, 2), np.int64), short], 1)])
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    _, cache = model.step(ids[:, :5], model.start(2), mask[:, :5])
    together, cache = model.step(ids[:, 5:], cache)
    assert np.array_equal(cache.mask, mask)
    for row, alone in enumerate((long, short)):
        expected, _ = model.step(alone, model.start(1))
        assert np.abs(together[row, -1] - expected[0, -1]).max() < CLOSE


def test_a_step_leaves_its_cache_as_it_is(model: Model, seed: int) -> None:
    _, prompt = model.step(random_ids(seed, 1, 4), model.start(1))
    first, _ = model.step([[3]], prompt)
    model.step([[4]], prompt)
    again, _ = model.step([[3]], prompt)
    assert np.array_equal(first, again)
    assert prompt.length == 4


def test_the_cache_stays_in_onnx_runtime(model: Model) -> None:
    _, cache = model.step([[1, 2, 3]], model.start(1))
    assert len(cache.values) == 2 * LAYERS
    for value in cache.values:
        assert isinstance(value, onnxruntime.OrtValue)
        assert value.data_type() == "tensor(int8)"
        assert list(value.shape()) == [1, KV_HEADS, 3, HEAD_SIZE]


def test_without_a_cache_a_step_reads_the_whole_sequence(tmp_path: Path) -> None:
    model = open_model(tmp_path, None, context=4)
    start = model.start(1)
    _, cache = model.step([[1, 2]], start)
    assert cache is start
    assert (cache.length, cache.values) == (0, ())
    with pytest.raises(RuntimeInputError, match="context of 4"):
        model.step([[1, 2, 3, 4, 5]], cache)
    with pytest.raises(RuntimeInputError, match="no input attention_mask"):
        model.step([[1, 2]], cache, [[1, 1]])


def test_more_tokens_than_the_context(model: Model) -> None:
    _, cache = model.step([[1] * 8], model.start(1))
    with pytest.raises(RuntimeInputError, match=r"8 past and 1 new tokens are more than .* 8"):
        model.step([[1]], cache)


@pytest.mark.parametrize(
    "mask", [[[1, 1]], [[1, 1, 1, 1]], [1, 1, 1], [[1, 1, 2]], [[1, 1, 1]] * 2]
)
def test_a_wrong_mask(model: Model, mask: list[object]) -> None:
    _, cache = model.step([[1, 2]], model.start(1))
    with pytest.raises(RuntimeInputError, match=r"expected 0 and 1 of shape \(1, 3\)"):
        model.step([[1]], cache, mask)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, VOCABULARY]], f"from 1 to {VOCABULARY}, .*vocabulary of {VOCABULARY}"),
        ([[-1, 1]], "from -1 to 1"),
        ([1, 2], r"shape \(2,\), expected integers \(batch, tokens\)"),
        ([[]], "expected integers"),
        ([[0.5]], "ids are float64"),
    ],
)
def test_wrong_ids(model: Model, ids: list[object], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        model.step(ids, model.start(1))


class TestWrongCache:
    @pytest.fixture
    def cache(self, model: Model) -> Cache:
        return model.step([[1, 2]], model.start(1))[1]

    def test_another_batch(self, model: Model, cache: Cache) -> None:
        with pytest.raises(RuntimeInputError, match="the ids have batch 2, the cache 1"):
            model.step([[1], [2]], cache)

    def test_another_type(self, model: Model, tmp_path: Path) -> None:
        other = open_model(tmp_path, "float16").start(1)
        with pytest.raises(RuntimeInputError, match=r"tensor\(float16\).*expected tensor\(int8\)"):
            model.step([[1]], other)

    def test_another_shape(self, model: Model, cache: Cache) -> None:
        wide = np.zeros((1, KV_HEADS, 2, HEAD_SIZE + 1), np.int8)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(wide)
        with pytest.raises(RuntimeInputError, match=r"past_key_values\.1\.value is"):
            model.step([[1]], replace(cache, values=(*cache.values[:-1], value)))

    def test_another_length(self, model: Model, cache: Cache) -> None:
        with pytest.raises(RuntimeInputError, match=r"past_key_values\.0\.key is"):
            model.step([[1]], replace(cache, mask=np.ones((1, 3), np.int64)))

    def test_another_number_of_layers(self, model: Model, cache: Cache) -> None:
        with pytest.raises(RuntimeInputError, match="holds 2 tensors, the model has 4"):
            model.step([[1]], replace(cache, values=cache.values[:2]))


def test_what_onnx_runtime_cannot_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tiny model has 64 learned positions, which nobody told the session file of."""
    model = open_model(tmp_path, "float32")
    with pytest.raises(RuntimeInputError, match="ONNX Runtime failed on 65 tokens after 0"):
        model.step([[1] * 65], model.start(1))
    capfd.readouterr()
