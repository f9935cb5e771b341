"""fptq-compiler: torch.export in, INT4 ONNX out, through function-preserving transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fptq_compiler.driver import Options as Options
    from fptq_compiler.driver import compile_model as compile_model

__all__ = ["Options", "compile_model"]


def __getattr__(name: str) -> Any:
    """Load the compiler when it is first asked for, so that `--help` need not."""
    if name in __all__:
        from fptq_compiler import driver

        return getattr(driver, name)
    message = f"module fptq_compiler has no attribute {name!r}"
    raise AttributeError(message)
