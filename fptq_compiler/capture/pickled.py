"""Models that were saved as a pickle: only for authors that the user trusts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fptq_compiler.errors import CaptureError


def load_pickled(path: Path, *, trust_pickle: bool) -> torch.nn.Module:
    """Unpickle a whole module. This runs whatever code the file's author put into it.

    Raises:
        CaptureError: without `trust_pickle`, or where the object is no module.
    """
    if not trust_pickle:
        message = (
            f"{path.name}: this is a pickled Python object, and loading it runs code from the "
            "file. Save the model with torch.export.save(torch.export.export(...)), or pass "
            "--trust-pickle together with example inputs if you trust its author."
        )
        raise CaptureError(message)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs foreign code, which raises anything
        reason = str(error).strip()[:300] or type(error).__name__
        message = (
            f"{path.name}: unpickling failed: {reason}. The file is damaged, or the classes that "
            "it names are not importable here."
        )
        raise CaptureError(message) from error
    if not isinstance(loaded, torch.nn.Module):
        hint = (
            "It looks like a state dict, which has no code: build the model, load it, and "
            if isinstance(loaded, dict)
            else "To compile a model, "
        )
        message = (
            f"{path.name}: expected a pickled torch.nn.Module, found {type(loaded).__name__}. "
            f"{hint}save it with torch.export.save(torch.export.export(...))."
        )
        raise CaptureError(message)
    return loaded


def load_example_inputs(path: Path) -> tuple[Any, ...]:
    """Read example inputs: ids [B, S] in a .npy file, or a tuple or dict of tensors in a .pt file.

    The file's content decides, not its name.

    Returns:
        The positional inputs; the values of a dict in its order.

    Raises:
        CaptureError: anything else, or a pickle that is not only tensors.
    """
    try:
        with path.open("rb") as file:
            numpy_file = file.read(6) == b"\x93NUMPY"
        if numpy_file:
            return (_ids(np.load(path, allow_pickle=False), path),)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        message = (
            f"{path.name}: the example inputs cannot be read ({reason}). Expected a .npy file of "
            "token ids [batch, sequence] or a tuple of tensors saved with torch.save."
        )
        raise CaptureError(message) from None
    if isinstance(loaded, dict):
        loaded = tuple(loaded.values())
    if isinstance(loaded, torch.Tensor):
        loaded = (loaded,)
    if not isinstance(loaded, tuple | list) or not all(
        isinstance(item, torch.Tensor) for item in loaded
    ):
        message = (
            f"{path.name}: expected a tensor, or a tuple or dict of tensors, found "
            f"{type(loaded).__name__}. Save example inputs with torch.save((ids,), path)."
        )
        raise CaptureError(message)
    return tuple(loaded)


def _ids(array: np.ndarray[Any, Any], path: Path) -> torch.Tensor:
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 2:
        message = (
            f"{path.name}: expected integer token ids of shape [batch, sequence], found "
            f"{array.dtype} {list(array.shape)}."
        )
        raise CaptureError(message)
    return torch.from_numpy(array.astype(np.int64))
