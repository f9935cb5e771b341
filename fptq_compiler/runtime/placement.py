"""Where the values of a session lie, and of which types those of a cache are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

ELEMENTS: Final[Mapping[str, tuple[type[np.generic], str]]] = {
    "float32": (np.float32, "tensor(float)"),
    "float16": (np.float16, "tensor(float16)"),
    "int8": (np.int8, "tensor(int8)"),
    "int4": (np.uint8, "tensor(uint8)"),
}
"""Each cache type's NumPy type, and ONNX Runtime's name for it; INT4 is packed two a byte."""

_ON_GPU: Final = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def device_of(session: Any) -> str:
    """Gives ONNX Runtime's name of the device that a session runs on: cpu or cuda."""
    return "cuda" if session.get_providers()[0] in _ON_GPU else "cpu"
