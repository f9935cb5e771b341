"""What ONNX Runtime must make of the file: its own optimised graph, counted.

A file that loads and is right but runs its weights in float is not what was asked for; the
optimised graph says which kernels will run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from fptq_compiler.errors import LoweringError
from fptq_compiler.graph import ops
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.targets.forms import forms_of
from fptq_compiler.memory import return_freed_memory
from fptq_compiler.recipe import Recipe

INTEGER_KERNELS = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm")
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contract:
    """The counts that a target demands of the optimised graph."""

    integer_linears: int
    weight_only_linears: int

    def check(self, kernels: Counter[str], int4_dequantized: int) -> list[str]:
        """The broken promises, in words; empty where the graph is as it should be."""
        broken = []
        integer = sum(kernels[k] for k in INTEGER_KERNELS)
        if integer != self.integer_linears:
            broken.append(
                f"{integer} fused integer matmuls ({', '.join(INTEGER_KERNELS)}), expected "
                f"{self.integer_linears}, one for each quantised linear"
            )
        if kernels["MatMulNBits"] != self.weight_only_linears:
            broken.append(
                f"{kernels['MatMulNBits']} MatMulNBits, expected {self.weight_only_linears}, "
                "one for each weight-only linear"
            )
        if int4_dequantized:
            broken.append(
                f"{int4_dequantized} DequantizeLinear read an INT4 weight on every run, "
                "expected none"
            )
        return broken


def contract_of(program: Program) -> Contract:
    """Read off the frozen program which linears are quantised how."""
    forms = forms_of(program)
    integer = weight_only = 0
    for node in program.call_nodes(ops.linear):
        bits, block = node.args[4], node.args[5]
        if forms.integer_linears or (bits == 8 and not block and forms.quantized_activations):
            integer += 1
        elif bits == 4 or block:
            weight_only += 1
    return Contract(integer, weight_only)


def arithmetic_of(recipe: Recipe) -> str | None:
    """What weight-only linears do, in words, where that is not what the bits say."""
    weights = recipe.bits.weights
    if recipe.weights.matmulnbits_accuracy_level != 4:
        return None
    return (
        f"W{weights} with dynamic INT8 activations (accuracy level 4), not W{weights}A16"
    )


def broken_promises(program: Program, written: ir.Model, optimized: ir.Model) -> list[str]:
    """What ONNX Runtime has not made of the program's linears, in words."""
    return contract_of(program).check(*count_kernels(optimized))


def session_options(config: Mapping[str, str]) -> onnxruntime.SessionOptions:
    """Options with the entries that a target's forms rely on."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def optimized_graph(path: Path, folder: Path, config: Mapping[str, str]) -> ir.Model:
    """What ONNX Runtime's CPU provider makes of a file; large weights are not in it.

    Raises:
        LoweringError: ONNX Runtime cannot load the file; its message is quoted.
    """
    optimized = folder / "optimized.onnx"
    options = session_options(config)
    options.optimized_model_filepath = str(optimized)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimized.data"
    )
    # Nothing runs here, and weights packed for the kernels are one more copy of them all.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        message = f"ONNX Runtime {onnxruntime.__version__} cannot load the written file: {error}"
        raise LoweringError(message) from error
    return_freed_memory()
    model = ir.load(optimized)
    optimized.unlink()
    (folder / "optimized.data").unlink(missing_ok=True)
    return model


def count_kernels(model: ir.Model) -> tuple[Counter[str], int]:
    """Kernels of an optimised graph, and how many dequantise an INT4 initialiser.

    Subgraphs count: a kernel inside a branch runs as well.
    """
    kernels: Counter[str] = Counter()
    int4 = 0
    for node in model.graph.all_nodes():
        kernels[node.op_type] += 1
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
            value = source.const_value if source is not None else None
            int4 += value is not None and value.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
    return kernels, int4
