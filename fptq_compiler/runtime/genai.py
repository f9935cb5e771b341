"""A folder that onnxruntime-genai opens: the model, its configuration, its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from fptq_compiler.errors import LoweringError, RuntimeLoadError
from fptq_compiler.runtime.model_file import ModelFile, read_model_file
from fptq_compiler.runtime.signature import IDS, LOGITS, MASK, PAST, PRESENT

_T = TypeVar("_T")

_PROVIDERS: Final[Mapping[str, str | None]] = {
    "CPUExecutionProvider": None,  # always there, and not to be named
    "CUDAExecutionProvider": "cuda",
}
"""Our names of providers in genai's words."""


def write_genai_folder(model_path: Path, folder: Path, tokenizer: Any) -> None:
    """Writes the folder. The model is linked where the file system can, else copied.

    Args:
        model_path: a model with a KV cache; its session file lies beside it.
        folder: created if need be; files of the same names are replaced.
        tokenizer: a transformers tokenizer, saved into the folder.

    Raises:
        RuntimeLoadError: the model is not whole, has no KV cache, or does not say what genai
            must know.
        LoweringError: the folder cannot be written.
    """
    file = read_model_file(model_path)
    config = genai_config(file, tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (file.path.name, *file.data_files):
            _link(file.path.with_name(name), folder / name)
        tokenizer.save_pretrained(folder)
        text = json.dumps(config, indent=2) + "\n"
        (folder / "genai_config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"cannot write {folder}: {error}"
        raise LoweringError(message) from error


def genai_config(file: ModelFile, tokenizer: Any) -> dict[str, Any]:
    """Makes the content of genai_config.json.

    Args:
        file: the model.
        tokenizer: gives the ids of special tokens where the session file does not.

    Raises:
        RuntimeLoadError: the model has no KV cache, or does not say what genai must know.
    """
    signature, settings = file.signature, file.settings
    if signature.cache_type is None or not signature.takes_mask:
        message = f"{file.path.name}: onnxruntime-genai needs a KV cache and an attention mask"
        raise RuntimeLoadError(message)
    context = _known(settings.context_length, file, "context_length in its session file")
    ends = list(settings.eos_token_ids) or [tokenizer.eos_token_id]
    end = _known(ends[0], file, "eos_token_ids in its session file, nor has the tokenizer one")
    start = settings.bos_token_id if settings.bos_token_id is not None else tokenizer.bos_token_id
    padding = tokenizer.pad_token_id
    heads = _query_heads(file)
    past, present = ([name.format("%d") for name in names] for names in (PAST, PRESENT))
    return {
        "model": {
            "type": "llama",
            "bos_token_id": end if start is None else start,
            "eos_token_id": ends,
            "pad_token_id": end if padding is None else padding,
            "vocab_size": _known(signature.vocabulary, file, "a fixed size of its logits"),
            "context_length": context,
            "decoder": {
                "session_options": _session_options(file),
                "filename": file.path.name,
                "head_size": signature.head_size,
                "hidden_size": heads * signature.head_size,
                "num_attention_heads": heads,
                "num_key_value_heads": signature.kv_heads,
                "num_hidden_layers": signature.layers,
                "inputs": {
                    "input_ids": IDS,
                    "attention_mask": MASK,
                    "past_key_names": past[0],
                    "past_value_names": past[1],
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": present[0],
                    "present_value_names": present[1],
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _session_options(file: ModelFile) -> dict[str, Any]:
    """The session options in genai's form: the session config's keys stand among them."""
    options: list[dict[str, dict[str, str]]] = []
    for provider in file.settings.providers:
        if provider not in _PROVIDERS:
            message = (
                f"{file.path.name} is for {provider}, expected one that onnxruntime-genai has: "
                f"{', '.join(_PROVIDERS)}"
            )
            raise RuntimeLoadError(message)
        name = _PROVIDERS[provider]
        if name is not None:
            options.append({name: {}})
    return {**file.settings.session_config, "provider_options": options}


def _query_heads(file: ModelFile) -> int:
    """Heads of the queries, which no input of the model shows."""
    text = _known(file.metadata.get("fptq.heads"), file, "fptq.heads in its metadata")
    if not text.isdecimal():
        message = f"{file.path.name}: fptq.heads in its metadata is {text!r}, expected a number"
        raise RuntimeLoadError(message)
    return int(text)


def _known(value: _T | None, file: ModelFile, what: str) -> _T:
    if value is None:
        message = f"{file.path.name}: onnxruntime-genai needs {what}, which is not there"
        raise RuntimeLoadError(message)
    return value


def _link(source: Path, target: Path) -> None:
    """Makes a hard link in place of whatever is there, or a copy on another file system."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
