"""The folder for onnxruntime-genai: its configuration, its files, and the same tokens from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fptq_compiler.errors import LoweringError, RuntimeLoadError
from fptq_compiler.runtime.genai import write_genai_folder
from fptq_compiler.runtime.generate import generate
from fptq_compiler.runtime.session import load
from fptq_compiler.runtime.session_file import SessionFile, write_session_file
from tests.cached_model import (
    CACHE_TYPES,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCABULARY,
    write_cached_model,
)

SETTINGS = SessionFile(
    session_config={"session.disable_prepacking": "1"}, context_length=40, eos_token_ids=(22,)
)
PROMPT = [3, 1, 4, 1, 5]
METADATA = {"fptq.heads": str(HEADS)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w21", bos_token="w1")


def write_model(folder: Path, cache: str | None, settings: SessionFile = SETTINGS) -> Path:
    path = write_cached_model(folder / "m.onnx", cache, external=True, metadata=METADATA)
    write_session_file(path, settings)
    return path


def read_config(folder: Path) -> Any:
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("cache", CACHE_TYPES)
def test_greedy_tokens_equal_ours(tmp_path: Path, tokenizer: Any, cache: str) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    path = write_model(tmp_path, cache)
    write_genai_folder(path, tmp_path / "genai", tokenizer)
    count = 12
    ours = list(generate(load(path, threads=1), PROMPT, max_new_tokens=count))

    model = og.Model(str(tmp_path / "genai"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + count)
    generator = og.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)]
    assert theirs == [*PROMPT, *ours]
    assert len(set(ours)) > 2


def test_the_configuration_is_read_off_the_model(tmp_path: Path, tokenizer: Any) -> None:
    write_genai_folder(write_model(tmp_path, "int4"), tmp_path / "genai", tokenizer)
    model = read_config(tmp_path / "genai")["model"]
    decoder = model.pop("decoder")
    assert model == {
        "type": "llama",
        "bos_token_id": 1,
        "eos_token_id": [22],
        "pad_token_id": 22,
        "vocab_size": VOCABULARY,
        "context_length": 40,
    }
    assert decoder == {
        "session_options": {"session.disable_prepacking": "1", "provider_options": []},
        "filename": "m.onnx",
        "head_size": HEAD_SIZE,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def test_special_tokens_of_the_tokenizer_where_the_session_file_has_none(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write_model(tmp_path, "int8", SessionFile(context_length=40, bos_token_id=7))
    write_genai_folder(path, tmp_path / "genai", tokenizer)
    model = read_config(tmp_path / "genai")["model"]
    assert (model["bos_token_id"], model["eos_token_id"]) == (7, [21])


def test_files_are_linked_and_replaced(tmp_path: Path, tokenizer: Any) -> None:
    path, folder = write_model(tmp_path, "int8"), tmp_path / "deep" / "genai"
    for _ in range(2):
        write_genai_folder(path, folder, tokenizer)
        for name in ("m.onnx", "m.onnx.data"):
            assert (folder / name).samefile(tmp_path / name)
    (folder / "m.onnx").unlink()
    (folder / "m.onnx").write_bytes(b"old")
    write_genai_folder(path, folder, tokenizer)
    assert (folder / "m.onnx").samefile(path)
    assert (folder / "tokenizer.json").is_file()


def test_files_are_copied_where_links_fail(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        message = "cross-device link"
        raise OSError(message)

    monkeypatch.setattr("os.link", refuse)
    path = write_model(tmp_path, "int8")
    write_genai_folder(path, tmp_path / "genai", tokenizer)
    assert (tmp_path / "genai" / "m.onnx").read_bytes() == path.read_bytes()
    assert not (tmp_path / "genai" / "m.onnx").samefile(path)


def test_the_models_own_folder_will_do(tmp_path: Path, tokenizer: Any) -> None:
    path = write_model(tmp_path, "int8")
    size = path.stat().st_size
    write_genai_folder(path, tmp_path, tokenizer)
    assert path.stat().st_size == size
    assert (tmp_path / "genai_config.json").is_file()


@pytest.mark.parametrize(
    ("cache", "settings", "metadata", "message"),
    [
        (None, SETTINGS, METADATA, "needs a KV cache"),
        ("int8", SessionFile(eos_token_ids=(2,)), METADATA, "needs context_length"),
        ("int8", SETTINGS, {}, r"needs fptq\.heads in its metadata"),
        ("int8", SETTINGS, {"fptq.heads": "many"}, "is 'many', expected a number"),
        (
            "int8",
            SessionFile(providers=("TensorrtExecutionProvider",), context_length=40),
            METADATA,
            "for TensorrtExecutionProvider",
        ),
    ],
)
def test_what_genai_could_not_open_is_refused(
    tmp_path: Path,
    tokenizer: Any,
    cache: str | None,
    settings: SessionFile,
    metadata: dict[str, str],
    message: str,
) -> None:
    path = write_cached_model(tmp_path / "m.onnx", cache, metadata=metadata)
    write_session_file(path, settings)
    with pytest.raises(RuntimeLoadError, match=message):
        write_genai_folder(path, tmp_path / "genai", tokenizer)
    assert not (tmp_path / "genai").exists()


def test_a_model_for_cuda_names_it(tmp_path: Path, tokenizer: Any) -> None:
    both = ("CUDAExecutionProvider", "CPUExecutionProvider")
    path = write_model(tmp_path, "int8", SessionFile(providers=both, context_length=40))
    write_genai_folder(path, tmp_path / "genai", tokenizer)
    options = read_config(tmp_path / "genai")["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"cuda": {}}]


def test_a_folder_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "genai").write_text("a file", encoding="utf-8")
    with pytest.raises(LoweringError, match="cannot write"):
        write_genai_folder(write_model(tmp_path, "int8"), tmp_path / "genai", tokenizer)
