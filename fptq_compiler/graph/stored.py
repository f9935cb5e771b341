"""Weights that lie in files and are read where they are used, so that memory holds a few of them.

In the module stands a `StoredParameter`, which has a shape and a dtype and no values;
`evaluate.attribute` reads them. What a pass writes in its place goes to a scratch folder.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from fptq_compiler.errors import PassError

LARGE = 1 << 18
"""Bytes from which a weight is worth a file."""
HELD = 1 << 30
"""Bytes of all weights up to which they are held while one model runs hundreds of times."""


class Source(Hashable, Protocol):
    """Where values lie; two sources are equal where they are the same place."""

    def read(self) -> Tensor:
        """The values, mapped or copied; they are gone from memory with the tensor."""


class ScratchFile:
    """Values in a file of their own, which is deleted when nothing refers to it any more."""

    def __init__(self, folder: Path, value: Tensor) -> None:
        """Write the values.

        Raises:
            PassError: the folder is full.
        """
        self._shape, self._dtype = value.shape, value.dtype
        try:
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                self._path = Path(file.name)
                weakref.finalize(self, self._path.unlink, missing_ok=True)
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        except OSError as error:
            message = (
                f"cannot keep {value.nbytes / 1e6:.0f} MB of weights in {folder}: "
                f"{error.strerror or error}; the folder needs the size of the float32 weights"
            )
            raise PassError(message) from error

    def read(self) -> Tensor:
        """The values, mapped; changes to them are not written."""
        size = self._shape.numel()
        return torch.from_file(
            str(self._path), shared=False, size=size, dtype=self._dtype
        ).reshape(self._shape)


class StoredParameter(nn.Parameter):
    """Stands for values in a file: on the meta device, so that none can be taken by mistake.

    Attributes:
        source: where the values lie, in any floating type.
        folder: where what replaces them is written; None is memory.
    """

    source: Source
    folder: Path | None

    def __new__(
        cls, source: Source, shape: torch.Size, dtype: torch.dtype, folder: Path | None
    ) -> Self:
        """Make the parameter; values are read as `dtype`."""
        made = super().__new__(cls, torch.empty(shape, dtype=dtype, device="meta"), False)
        made.source, made.folder = source, folder
        return made

    def read(self) -> Tensor:
        """The values in the parameter's dtype."""
        return self.source.read().to(self.dtype)

    def replaced_by(self, value: Tensor) -> Tensor:
        """What stands for `value` in this one's place: stored too, where it is large."""
        if self.folder is None or value.nbytes < LARGE or isinstance(value, StoredParameter):
            return value
        return StoredParameter(
            ScratchFile(self.folder, value), value.shape, value.dtype, self.folder
        )

    def mapped(self, value: Tensor) -> Tensor:
        """The same values, mapped where they are large enough to be stored."""
        found = self.replaced_by(value)
        return found.read() if isinstance(found, StoredParameter) else found


def identity(value: Tensor) -> Hashable:
    """Equal for tensors that share their memory or their place in a file."""
    return value.source if isinstance(value, StoredParameter) else value.data_ptr()


def copy_of(value: Tensor) -> Tensor:
    """A tensor of its own with the same values; what is stored is copied when it is replaced."""
    if isinstance(value, StoredParameter):
        return StoredParameter(value.source, value.shape, value.dtype, value.folder)
    return value.detach().clone()


def bind_sources(
    module: nn.Module, sources: Mapping[str, Source], folder: Path | None
) -> None:
    """Let all parameters be read from their sources; small ones are read now.

    Args:
        module: its parameters hold nothing yet.
        sources: by parameter name; tied parameters have equal ones.
        folder: for what replaces them; None is memory.
    """
    for name, unset in list(module.named_parameters(remove_duplicate=False)):
        stored = StoredParameter(sources[name], unset.shape, unset.dtype, folder)
        small = unset.nbytes < LARGE
        kept = nn.Parameter(stored.read().clone(), False) if small else stored
        _register(module, name, kept)


def put_away(module: nn.Module, folder: Path) -> None:
    """Write the large parameters of a module to files in `folder`, tied ones to one.

    Raises:
        PassError: the folder is full.
    """
    written: dict[Hashable, ScratchFile] = {}
    for name, value in list(module.named_parameters(remove_duplicate=False)):
        if value.nbytes < LARGE:
            continue
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in written:
            written[place] = ScratchFile(folder, value)
        stored = StoredParameter(written[place], value.shape, value.dtype, folder)
        _register(module, name, stored)


def hold(module: nn.Module) -> dict[str, StoredParameter]:
    """Read all stored parameters into memory; gives those, by name."""
    stored = {
        name: value
        for name, value in module.named_parameters(remove_duplicate=False)
        if isinstance(value, StoredParameter)
    }
    for name, value in stored.items():
        _register(module, name, nn.Parameter(value.read().clone(), False))
    return stored


def worth_holding(module: nn.Module) -> bool:
    """Whether the stored parameters of a module are few enough."""
    return sum(p.nbytes for p in module.parameters() if isinstance(p, StoredParameter)) <= HELD


@contextmanager
def held_for_many_runs(module: nn.Module) -> Iterator[None]:
    """Hold the stored parameters of a module inside, where they are few enough."""
    stored = hold(module) if worth_holding(module) else {}
    try:
        yield
    finally:
        for name, value in stored.items():
            _register(module, name, value)


def _register(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner).register_parameter(last, value)
