"""Weights in files beside the model: checked before ONNX Runtime maps them into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from fptq_compiler.errors import RuntimeLoadError


def check_external_data(model: onnx.ModelProto, folder: Path) -> tuple[str, ...]:
    """Checks that every external tensor lies whole inside its file.

    Args:
        model: loaded without its external data.
        folder: where the model lies; locations are relative to it.

    Returns:
        The names of the files, sorted.

    Raises:
        RuntimeLoadError: a file is missing, too short, or outside of the folder, or a tensor's
            length is not that of its shape and type.
    """
    names = set()
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            _check(tensor, ExternalDataInfo(tensor), folder)
            names.add(ExternalDataInfo(tensor).location)
    return tuple(sorted(names))


def _check(tensor: onnx.TensorProto, info: ExternalDataInfo, folder: Path) -> None:
    location = PurePosixPath(info.location)
    if location.is_absolute() or ".." in location.parts:
        message = (
            f"tensor {tensor.name}: its data is in {info.location}, outside of the model's "
            "folder, which is not read"
        )
        raise RuntimeLoadError(message)
    path = folder / location
    if not path.is_file():
        message = (
            f"{path}: no such file. It holds the model's weights (first {tensor.name}) and must "
            "lie beside the ONNX file."
        )
        raise RuntimeLoadError(message)
    expected = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
    length = expected if info.length is None else info.length
    if length != expected:
        message = (
            f"tensor {tensor.name}: the model gives it {length} bytes in {path.name}, its shape "
            f"{list(tensor.dims)} and type need {expected}. The model is damaged."
        )
        raise RuntimeLoadError(message)
    end = (info.offset or 0) + length
    size = path.stat().st_size
    if size < end:
        message = (
            f"{path}: {size} bytes, but tensor {tensor.name} ends at byte {end}. The file is "
            "truncated or belongs to another model: copy it again."
        )
        raise RuntimeLoadError(message)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All initialisers and constants, also those of the graphs inside of nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
