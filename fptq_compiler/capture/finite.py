"""Refuse weights that are not numbers: one NaN makes every later number a NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fptq_compiler.errors import CaptureError
from fptq_compiler.graph.stored import Source

_CHUNK = 1 << 22  # elements looked at a time, so that no mask of a whole embedding is made


def refuse_non_finite(
    program: torch.export.ExportedProgram, sources: Mapping[str, Source] | None = None
) -> None:
    """Look through parameters, buffers and constants, one at a time; those of files in the files.

    Buffers and constants may hold -inf (attention masks do), but no NaN; parameters must be
    finite.

    Raises:
        CaptureError: naming the first parameter that is not finite and how many values are not.
    """
    parameters = set(program.graph_signature.parameters)
    tensors = {**program.constants, **program.state_dict}
    for name, held in tensors.items():
        tensor = sources[name].read() if sources and name in sources else held
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        wrong = count_non_finite(tensor, allow_infinity=name not in parameters)
        if wrong:
            message = (
                f"{name} has {wrong} values that are NaN or infinite out of {tensor.numel()} "
                f"(shape {tuple(tensor.shape)}, {tensor.dtype}). The file is damaged or the model "
                "diverged in training; start from a sound checkpoint."
            )
            raise CaptureError(message)


def count_non_finite(tensor: torch.Tensor, *, allow_infinity: bool) -> int:
    """Number of NaN (and, unless allowed, infinite) values of a floating-point tensor."""
    flat = tensor.detach().reshape(-1)
    wrong = 0
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        if bool(torch.stack(torch.aminmax(piece)).isfinite().all()):  # NaN is both, and it is fast
            continue
        bad = torch.isnan(piece) if allow_infinity else ~torch.isfinite(piece)
        wrong += int(bad.sum())
    return wrong
