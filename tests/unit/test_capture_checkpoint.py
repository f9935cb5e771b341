"""A folder whose weights stay in its files, from capture to the ONNX file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fptq_compiler import driver
from fptq_compiler.capture import capture
from fptq_compiler.capture.checkpoint import ReadWhereUsed
from fptq_compiler.capture.huggingface import load_huggingface, load_unread
from fptq_compiler.errors import CaptureError
from fptq_compiler.graph import stored
from fptq_compiler.graph.stored import StoredParameter
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import CacheRecipe
from fptq_compiler.stages import take_in
from tests.compiling import quick

IDS = torch.arange(18).reshape(2, 9)


def save_llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "llama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_program_computes_what_the_held_model_computes(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "LARGE", 0)
    saved = save_llama(tmp_path / "llama", dtype)
    expected = take_in(capture(saved).program).run(IDS)
    captured = capture(saved, unread=True)
    program = take_in(captured.program, sources=captured.sources, folder=tmp_path)
    assert all(isinstance(p, StoredParameter) for p in program.module.parameters())
    assert torch.equal(program.run(IDS), expected)


def test_the_empty_model_runs_on_the_values_of_its_files(folder: Path) -> None:
    expected = load_huggingface(folder)(IDS).logits
    found = load_unread(folder)
    assert found is not None
    model, sources = found
    with torch.no_grad(), ReadWhereUsed(model, sources):
        assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, expected)


def test_a_parameter_made_of_several_tensors_is_held(tmp_path: Path) -> None:
    """Mixtral's experts stand one by one in the file and together in the model."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert load_unread(tmp_path) is None
    assert not capture(tmp_path, unread=True).sources


def test_a_folder_that_lacks_a_weight_is_held_and_so_refused(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        weights.pop("model.layers.1.mlp.up_proj.weight", None)
        save_file(weights, path, metadata={"format": "pt"})
    assert load_unread(folder) is None


def test_a_file_that_changes_meanwhile_is_named(folder: Path) -> None:
    captured = capture(folder, unread=True)
    program = take_in(captured.program, sources=captured.sources)
    source = captured.sources["model.norm.weight"]
    assert source.read().shape == (32,)
    for path in folder.glob("*.safetensors"):
        save_file({"other": torch.ones(2)}, path)
    with pytest.raises(CaptureError, match=r"model\.norm\.weight cannot be read any more"):
        source.read()
    assert program.run(IDS).isfinite().all()  # small weights were read when it was taken in


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4-8-8", "16-16-16"])
def test_the_file_is_the_same_as_from_held_weights(
    folder: Path, tmp_path: Path, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = CacheRecipe(enabled=True, max_length=32)
    recipe = replace(quick(bits, target="ort-cpu"), cache=cached, verify="off")
    options = driver.Options(recipe=recipe)
    held_path, unread_path = tmp_path / "held.onnx", tmp_path / "unread.onnx"
    driver.compile_file(folder, held_path, options, SilentProgress())
    monkeypatch.setattr(stored, "LARGE", 1 << 10)
    driver.compile_file(folder, unread_path, options, SilentProgress())
    assert held_path.read_bytes() == unread_path.read_bytes()
    assert len(onnx.load(unread_path).graph.initializer) > 10
    assert not list(tmp_path.glob(".*"))
