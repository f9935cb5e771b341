"""Numbers of the ONNX element types, as attributes of operators take them."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

FLOAT: Final = ir.DataType.FLOAT.value
FLOAT16: Final = ir.DataType.FLOAT16.value
BFLOAT16: Final = ir.DataType.BFLOAT16.value
INT4: Final = ir.DataType.INT4.value
INT8: Final = ir.DataType.INT8.value
UINT8: Final = ir.DataType.UINT8.value
INT16: Final = ir.DataType.INT16.value
INT32: Final = ir.DataType.INT32.value
BOOL: Final = ir.DataType.BOOL.value
