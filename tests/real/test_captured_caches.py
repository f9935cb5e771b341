"""Models that transformers captured with a KV cache of its own, all the way to ONNX."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.export import Dim, ExportedProgram
from transformers.integrations import executorch

from fptq_compiler import driver
from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph import evaluate
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import CacheRecipe
from fptq_compiler.runtime.session import load
from fptq_compiler.stages import take_in
from tests.compiling import quick, run_onnx
from tests.real.families import VOCABULARY, Family, make_model
from tests.real.test_kv_cache import CLOSE, WIDE, check_decoding, compile_cached

POSITIONS = 40
"""Of the static caches."""
ANGLES = 1e-6
"""Relative: transformers computes the angles of RoPE in float32, which shows 3e-8."""
FREE = Dim.DYNAMIC
FAMILIES = {
    "llama": Family(settings=WIDE),
    "llama-eager": Family(settings=WIDE, attention="eager"),
    "qwen2": Family("Qwen2", settings=WIDE),
    "gemma": Family("Gemma", settings=WIDE),
    "phi3": Family("Phi3", settings={"hidden_size": 64}),
    "llama-bfloat16": Family(settings=WIDE, dtype=torch.bfloat16),
}


def growing(model: Any) -> ExportedProgram:
    """DynamicCache, as the documentation of transformers captures it: mask, cache, logits."""
    executorch.register_dynamic_cache_export_support()
    cache = transformers.DynamicCache(config=model.config)
    # transformers calls it so from 5.24 on
    known = "cache" in inspect.signature(model.forward).parameters
    name = "cache" if known else "past_key_values"
    model(torch.arange(10).reshape(2, 5), **{name: cache}, use_cache=True)
    layers = model.config.num_hidden_layers
    past = {0: FREE, 2: FREE}
    return torch.export.export(
        model,
        (),
        {
            "input_ids": torch.arange(6).reshape(2, 3),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
            name: cache,
            "use_cache": True,
        },
        dynamic_shapes={
            "input_ids": {0: FREE, 1: FREE},
            "attention_mask": {0: FREE, 1: FREE},
            name: [[past] * layers, [past] * layers],
            "use_cache": None,
        },
        strict=False,
    )


def static(model: Any, *, strict: bool = False, batch: int = 1) -> ExportedProgram:
    """StaticCache, as transformers' own exporter for ExecuTorch captures it."""
    model.generation_config = transformers.GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": batch, "max_cache_len": POSITIONS},
    )
    tokens = {1: Dim("tokens", max=POSITIONS - 1)}
    module = executorch.TorchExportableModuleForDecoderOnlyLM(model)
    return module.export(
        input_ids=torch.arange(3).expand(batch, 3),
        cache_position=torch.arange(3),
        dynamic_shapes={"input_ids": tokens, "cache_position": {0: tokens[1]}},
        strict=strict,
    )


def whole(model: Any, program: Program, rows: int, tokens: int) -> float:
    """How far the program is from transformers without a cache, in float64."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator)
    found = evaluate.logits(program.module, [ids], torch.float64)
    return relative_error(found, model.double()(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("capture", "name"),
    [(growing, "llama"), (static, "llama-eager")]
    + [
        pytest.param(capture, name, marks=pytest.mark.slow)
        for capture in (growing, static) for name in FAMILIES
        if (capture, name) not in ((growing, "llama"), (static, "llama-eager"))
    ],
)
def test_what_is_left_computes_whole_sequences(
    capture: Callable[[Any], ExportedProgram], name: str
) -> None:
    """Any batch, though a static cache fixes it, and any length."""
    model = make_model(FAMILIES[name])
    program = take_in(capture(model))
    assert [(s.name, s.dims) for s in program.inputs] == [("input_ids", ("batch", "sequence"))]
    for rows, tokens in [(1, 1), (2, 9), (3, 30)]:
        assert whole(model, program, rows, tokens) <= ANGLES


def check_generation(path: Path, model: Any) -> None:
    """Greedy tokens of the file are those of transformers."""
    compiled = load(path, threads=1)
    ids = torch.tensor([[1, 7, 30, 12]])
    expected = model.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    cache, tokens, found = compiled.start(1), ids.numpy(), []
    for _ in range(12):
        logits, cache = compiled.step(tokens, cache)
        tokens = logits[:, -1:].argmax(-1)
        found.append(int(tokens[0, 0]))
    assert found == expected[0, ids.shape[1]:].tolist()


def test_an_archive_with_a_growing_cache_generates(tmp_path: Path) -> None:
    """Saved, read as a file that nobody vouches for, and given a cache of ours."""
    model = make_model(FAMILIES["llama"])
    archive, path = tmp_path / "model.pt2", tmp_path / "model.onnx"
    torch.export.save(growing(model), archive)
    recipe = quick("16-16-16", target="ort-cpu", cache=CacheRecipe(enabled=True, max_length=40))
    report = driver.compile_file(archive, path, driver.Options(recipe=recipe), SilentProgress())
    assert any(d.startswith("captured with a growing KV cache of 4") for d in report.decisions)
    check_decoding(path, lambda ids: model(ids).logits.numpy(), VOCABULARY)
    check_generation(path, model)


def test_a_static_cache_generates(tmp_path: Path) -> None:
    """Its length bounds the new cache's."""
    model = make_model(FAMILIES["qwen2"])
    exported = static(model)
    model.generation_config = transformers.GenerationConfig()
    path = tmp_path / "model.onnx"
    compile_cached(exported, path, "qdq")
    check_decoding(path, lambda ids: model(ids).logits.numpy(), VOCABULARY)
    check_generation(path, model)


@pytest.mark.slow
def test_without_a_cache_asked_for_the_file_reads_whole_sequences(tmp_path: Path) -> None:
    model = make_model(FAMILIES["llama"])
    path = tmp_path / "model.onnx"
    options = driver.Options(recipe=quick("16-16-16"))
    driver.compile_model(growing(model), path, options=options)
    ids = torch.arange(22).reshape(2, 11)
    expected = model(ids).logits
    assert relative_error(run_onnx(path, ids), expected) <= CLOSE


def test_one_token_a_run_is_refused() -> None:
    model = make_model(FAMILIES["llama"])
    model.generation_config = transformers.GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": POSITIONS},
    )
    module = executorch.TorchExportableModuleForDecoderOnlyLM(model)
    exported = module.export(
        input_ids=torch.tensor([[1]]), cache_position=torch.tensor([0]), strict=False
    )
    with pytest.raises(UnsupportedModelError, match=r"exactly 1 token\(s\) a run: .*input_ids"):
        take_in(exported)
