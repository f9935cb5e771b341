"""Windows and soft-capping on every target: ONNX Runtime computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fptq_compiler import driver
from fptq_compiler.recipe import CacheRecipe
from fptq_compiler.runtime.session import load
from tests.compiling import quick, run_onnx
from tests.toys import MAX_POSITIONS, Toy, ToyConfig, make_tokens, make_toy

CLOSE = 1e-5
"""Of the largest logit: float32 in another order shows 1e-6; a window of one more 1e-2."""
CONFIG = ToyConfig(layers=2, hidden=32, mlp=48, head_dim=16)
TARGETS = ("qdq", "ort-cpu", "ort-cuda", "tensorrt")
WINDOWS = (5, 0)
CAP = 3.0


def attend_in(window: int, softcap: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(q.shape[2])
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & (behind < window) if window else behind >= 0
        return torch.matmul(scores.masked_fill(~seen, float("-inf")).softmax(-1), v)

    return attend


def windowed(softcap: float) -> Toy:
    """Two layers as in Gemma: the first sees a window, the second everything."""
    toy = make_toy(CONFIG)
    for layer, window in zip(toy.model.layers, WINDOWS, strict=True):
        layer.self_attn.attend = attend_in(window, softcap)
    return toy


def export(toy: Toy) -> ExportedProgram:
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=MAX_POSITIONS)}
    return torch.export.export(
        toy, (make_tokens(CONFIG, 2, 7),), dynamic_shapes=(sizes,), strict=False
    )


def compiled(softcap: float, target: str, path: Path, *, cached: bool) -> Toy:
    toy = windowed(softcap)
    cache = CacheRecipe(enabled=cached, max_length=40 if cached else 0)
    recipe = quick("16-16-16", target=target, dtype="float32", cache=cache)
    driver.compile_model(export(toy), path, options=driver.Options(recipe=recipe))
    return toy


def relative(found: np.ndarray, expected: Tensor) -> float:
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


@pytest.mark.parametrize("target", TARGETS)
def test_whole_sequences(target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    toy = compiled(CAP, target, path, cached=False)
    for batch, length in ((2, 19), (1, 3)):
        ids = make_tokens(CONFIG, batch, length)
        assert relative(run_onnx(path, ids).numpy(), toy(ids)) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_decoding(target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    toy = compiled(CAP, target, path, cached=True)
    model = load(path, provider="cpu", threads=1)
    ids = make_tokens(CONFIG, 2, 24)
    expected = toy(ids)
    for bounds in ([0, 24], [0, 9, 10, 11, 23, 24], [0, 1, 2, 12, 24]):
        cache, found = model.start(2), []
        for start, stop in pairwise(bounds):
            logits, cache = model.step(ids[:, start:stop].numpy(), cache)
            found.append(logits)
        assert relative(np.concatenate(found, 1), expected) <= CLOSE


def test_padding_does_not_count_in_a_window(tmp_path: Path) -> None:
    """Three tokens, two of padding, then more: row 1 sees no difference, and is right."""
    path = tmp_path / "model.onnx"
    toy = compiled(0.0, "ort-cpu", path, cached=True)
    model = load(path, provider="cpu", threads=1)
    ids = make_tokens(CONFIG, 2, 12)
    expected = toy(ids)
    mask = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    _, cache = model.step(ids[:, :5].numpy(), model.start(2), mask)
    rest = torch.stack((ids[0, 5:], ids[1, 3:10]))
    found, _ = model.step(rest.numpy(), cache)
    assert relative(found[0], expected[0, 5:]) <= CLOSE
    assert relative(found[1], expected[1, 3:10]) <= CLOSE
