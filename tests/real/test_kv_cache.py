"""Real architectures with a KV cache: ONNX decodes what transformers computes at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fptq_compiler import driver
from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import CacheRecipe
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile
from tests.compiling import quick
from tests.real.families import SIZES, VOCABULARY, Family, export_plainly, make_model
from tests.real.test_exports import BIASES, LLAMA3_ROPE, YARN

CLOSE = 1e-4
"""Of the largest logit: float32 in another order shows 6e-7; angles of the next position 1e-1."""
CONTEXT: int = SIZES["max_position_embeddings"]
WIDE = {"head_dim": 16}
"""Heads of 16 channels have the fused kernel of ort-cpu; the 8 of `SIZES` have not."""
FAMILIES = {
    "llama": Family(settings=WIDE),
    "llama3-rope": Family(settings=WIDE | {"rope_parameters": LLAMA3_ROPE}),
    "yarn": Family(settings=WIDE | {"rope_parameters": YARN}),
    "llama-biases-mqa": Family(settings=WIDE | BIASES | {"num_key_value_heads": 1}),
    "llama-eager-narrow": Family(attention="eager"),
    "qwen2": Family("Qwen2", settings=WIDE),
    "mistral": Family("Mistral", settings=WIDE | {"sliding_window": None}),
    "mistral-window": Family("Mistral", settings=WIDE | {"sliding_window": 5}),
    "gemma2": Family("Gemma2", attention="eager", settings=WIDE | {"sliding_window": 5}),
    "qwen3": Family("Qwen3", settings=WIDE),
    "smollm3": Family("SmolLM3", settings=WIDE | {"no_rope_layers": [1, 0]}),
    "opt-learned-positions": Family("OPT", settings={"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "neox-packed-heads": Family("GPTNeoX", settings={"rotary_pct": 0.5}),
    "phi3": Family("Phi3", settings={"hidden_size": 64}),
    "gemma": Family("Gemma", settings=WIDE),
    "glm-partial-rope": Family("Glm", settings=WIDE),
}
BOUNDS = {"tokens": list(range(13)), "chunks": [0, 5, 6, 7, 12]}


def compile_cached(model: object, path: Path, target: str, max_length: int = 0) -> None:
    cache = CacheRecipe(enabled=True, max_length=max_length)
    options = driver.Options(recipe=quick("16-16-16", target=target, cache=cache))
    driver.compile_model(model, path, options=options)  # type: ignore[arg-type]


def check_decoding(
    path: Path, original: Callable[[torch.Tensor], npt.NDArray[np.float32]], vocabulary: int
) -> None:
    model = load(path, threads=1)
    assert model.cache_type == "float32"
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocabulary, (2, 12), generator=generator)
    expected = original(ids)
    for bounds in BOUNDS.values():
        cache, found = model.start(2), []
        for start, stop in pairwise(bounds):
            logits, cache = model.step(ids[:, start:stop].numpy(), cache)
            found.append(logits)
        error = np.abs(np.concatenate(found, 1) - expected).max() / np.abs(expected).max()
        assert error <= CLOSE


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """The context is the model's own, and so are the tables of angles."""
    model = make_model(FAMILIES[name])
    path = tmp_path / "model.onnx"
    compile_cached(model, path, "ort-cpu")
    assert SessionFile.read(path).context_length == CONTEXT
    check_decoding(path, lambda ids: model(ids).logits.numpy(), VOCABULARY)


@pytest.mark.parametrize("name", ["llama3-rope", "phi3"])
def test_decoding_in_standard_onnx(name: str, tmp_path: Path) -> None:
    model = make_model(FAMILIES[name])
    path = tmp_path / "model.onnx"
    compile_cached(model, path, "qdq")
    check_decoding(path, lambda ids: model(ids).logits.numpy(), VOCABULARY)


@pytest.mark.parametrize("name", ["llama", "llama-eager-narrow", "mistral"])
def test_a_plain_export_of_a_user(name: str, tmp_path: Path) -> None:
    """Its mask is made of positions, which are gone with it; it says no context."""
    model = make_model(FAMILIES[name])
    path = tmp_path / "model.onnx"
    compile_cached(export_plainly(model), path, "ort-cpu", max_length=100)
    assert SessionFile.read(path).context_length == 100
    check_decoding(path, lambda ids: model(ids).logits.numpy(), VOCABULARY)


@pytest.mark.slow
def test_a_folder_with_text_ends_and_context(stories: Path, tmp_path: Path) -> None:
    """stories260K, trained: heads of 8 channels, 8 of queries to 4 of keys."""
    path = tmp_path / "model.onnx"
    recipe = quick("16-16-16", target="ort-cpu", cache=CacheRecipe(enabled=True))
    driver.compile_file(stories, path, driver.Options(recipe=recipe), SilentProgress())
    session = SessionFile.read(path)
    assert (session.bos_token_id, session.eos_token_ids) == (1, (2,))
    original, _ = driver.original_logits(stories)
    check_decoding(path, lambda ids: original(ids).numpy(), 512)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (
            Family("Bloom", attention="eager", settings={"n_head": 4, "n_layer": 1}),
            r"its mask is not the plain causal one \(File .*modeling_bloom\.py",
        ),
    ],
    ids=["alibi"],
)
def test_what_cannot_be_given_a_cache(family: Family, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        compile_cached(make_model(family), tmp_path / "model.onnx", "ort-cpu")
    assert str(caught.value).startswith("--kv-cache: attention at ")
    assert str(caught.value).endswith("Compile without --kv-cache.")
    assert list(tmp_path.iterdir()) == []
