"""A Hugging Face folder whose weights stay in its files: the model is made without them.

torch.export looks at shapes only, so it gets a model whose parameters hold nothing (memory that
nobody touches is not taken). Which tensor of which file each parameter is, transformers itself
says: it is handed empty tensors in the place of the file's, and each is found again by its
address in the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fptq_compiler.errors import CaptureError
from fptq_compiler.graph.stored import Source, identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a safetensors file."""

    path: Path
    name: str

    def read(self) -> Tensor:
        """The values in the file's type, mapped while somebody holds them.

        Raises:
            CaptureError: the file has gone, or is another one by now.
        """
        try:
            with safe_open(self.path, framework="pt") as opened:
                found: Tensor = opened.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            message = (
                f"{self.path.name}: {self.name} cannot be read any more ({error}), expected the "
                "file to stay as it is until the compilation ends"
            )
            raise CaptureError(message) from error
        return found


def empty_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, FileTensor]]:
    """By name, the tensors of the folder's files: in float32, without values, and their places."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, FileTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.offset_keys():
                shape = opened.get_slice(name).get_shape()
                tensors[name] = torch.empty(shape, dtype=torch.float32)
                places[name] = FileTensor(path, name)
    return tensors, places


def find_sources(
    model: torch.nn.Module, tensors: Mapping[str, Tensor], places: Mapping[str, FileTensor]
) -> dict[str, Source] | None:
    """By parameter name, its place; None where a parameter is not one whole tensor of a file."""
    known = {identity(tensor): name for name, tensor in tensors.items() if tensor.numel()}
    found: dict[str, Source] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = known.get(identity(parameter))
        if place is None or tensors[place].shape != parameter.shape:
            logger.info("%s is not one tensor of the files: all weights are held", name)
            return None
        found[name] = places[place]
    for name, buffer in model.named_buffers():
        if name in tensors or identity(buffer) in known:
            logger.info("the buffer %s stands in the files: all weights are held", name)
            return None
    return found


class ReadWhereUsed(TorchFunctionMode):
    """Inside, every operator gets the values of parameters that hold none."""

    def __init__(self, model: torch.nn.Module, sources: Mapping[str, Source]) -> None:
        super().__init__()
        self._sources = {
            id(parameter): sources[name]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name in sources
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call `func` on the values."""
        args, kwargs = tree_map(self._read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _read(self, value: Any) -> Any:
        source = self._sources.get(id(value))
        return value if source is None else source.read().to(value.dtype)
