"""Everything that can be known of a compiled model before a session is opened on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from fptq_compiler.errors import RuntimeLoadError
from fptq_compiler.runtime.external_data import check_external_data
from fptq_compiler.runtime.session_file import SessionFile, session_path
from fptq_compiler.runtime.signature import Signature, read_signature


@dataclass(frozen=True)
class ModelFile:
    """A model that is whole on disk.

    Attributes:
        path: the ONNX file.
        signature: what the model takes and gives.
        settings: its session file's.
        metadata: the ONNX file's own, such as fptq.target.
        data_files: names of the files of external data beside it.
    """

    path: Path
    signature: Signature
    settings: SessionFile
    metadata: Mapping[str, str]
    data_files: tuple[str, ...]


def read_model_file(path: Path) -> ModelFile:
    """Reads a model's graph, metadata and session file, and checks its external data.

    Raises:
        RuntimeLoadError: no such file, not an ONNX file, not a language model, made for another
            target than its session file, or without all of its weights.
    """
    model = _read_proto(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    settings = _settings(path, metadata)
    try:
        data_files = check_external_data(model, path.parent)
        signature = read_signature(model)
    except RuntimeLoadError as error:
        message = f"{path.name}: {error}"
        raise RuntimeLoadError(message) from error
    return ModelFile(path, signature, settings, metadata, data_files)


def _read_proto(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        message = f"{path}: no such file"
        raise RuntimeLoadError(message)
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own, or the operating system's
        message = f"{path}: not an ONNX file, or a truncated one ({error})"
        raise RuntimeLoadError(message) from error
    if not model.graph.node:
        message = f"{path}: not an ONNX file, or one without a graph"
        raise RuntimeLoadError(message)
    return model


def _settings(path: Path, metadata: Mapping[str, str]) -> SessionFile:
    """The session file, or without one the defaults, for the target that the model names."""
    target = metadata.get("fptq.target", SessionFile.target)
    if not session_path(path).is_file():
        return SessionFile(target=target)
    settings = SessionFile.read(path)
    if settings.target != target:
        message = (
            f"{session_path(path)}: made for the target {settings.target}, but {path.name} is "
            f"for {target}. Take the session file that was written with the model."
        )
        raise RuntimeLoadError(message)
    return settings
