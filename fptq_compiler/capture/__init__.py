"""Model input: from what the user names to an `ExportedProgram`."""

from fptq_compiler.capture.finite import refuse_non_finite
from fptq_compiler.capture.huggingface import export_causal_lm
from fptq_compiler.capture.pickled import load_example_inputs
from fptq_compiler.capture.source import Captured, capture

__all__ = [
    "Captured",
    "capture",
    "export_causal_lm",
    "load_example_inputs",
    "refuse_non_finite",
]
