"""Program -> torch.export -> ONNX, with each composite operator translated by the target."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from fptq_compiler.errors import LoweringError
from fptq_compiler.graph import evaluate
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.targets import Target
from fptq_compiler.lower.unread import read_when_written, take_stored

EXPORTED_OPSET = 21  # the exporter turns nothing into operators of a later opset by itself
EXAMPLE_PAST = 3  # tokens: torch.export takes sizes 0 and 1 for constants


def to_onnx(program: Program, target: Target) -> ir.Model:
    """Translate the program, with symbolic batch and sequence where it has them.

    Raises:
        LoweringError: torch.export or torch.onnx refuses the graph; the cause is quoted.
    """
    _free_strides(program)
    _spell_casts(program)
    plain = evaluate.default_inputs(program.module, 2, 7, EXAMPLE_PAST)
    example = list(plain.values())
    shapes = tuple(
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(s.dims) if isinstance(d, str)}
        for s in program.inputs
    )
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # A plain module: the program's own still knows the inputs that it was captured with.
            plain_module = torch.fx.GraphModule(program.module, program.graph)
            stored = take_stored(plain_module)
            exported = torch.export.export(
                plain_module, tuple(example), dynamic_shapes=shapes, strict=False
            )
            try:
                model = _translated(_settled(exported), program, target)
            except torch.onnx.OnnxExporterError:
                model = _translated(exported, program, target)
    except Exception as error:
        message = f"torch.onnx could not translate the frozen graph: {error}"
        raise LoweringError(message) from error
    read_when_written(model, stored)
    _drop_traces(model)
    _name_dimensions(program, model)
    return model


def _translated(exported: ExportedProgram, program: Program, target: Target) -> ir.Model:
    found = torch.onnx.export(
        exported,
        (),
        opset_version=EXPORTED_OPSET,
        optimize=False,
        verbose=False,
        input_names=[s.name for s in program.inputs],
        output_names=list(program.outputs),
        custom_translation_table=target.translations(program),
    )
    assert found is not None
    return found.model


def _settled(exported: ExportedProgram) -> ExportedProgram:
    """The same, of which the exporter decomposes nothing, and so need not trace it once more.

    In-place operators stay for it to take out.
    """
    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    if any(call._schema.is_mutable for call in calls if isinstance(call, torch._ops.OpOverload)):
        return exported
    settled = copy.copy(exported)
    settled.run_decompositions = lambda table: settled
    return settled


def _free_strides(program: Program) -> None:
    """Views were legal on the strides of the capture; rewritten, values may lie otherwise."""
    for node in program.call_nodes(torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _spell_casts(program: Program) -> None:
    """A cast as the operator that has a translation."""
    for node in program.call_nodes(torch.ops.aten.to.dtype):
        node.target = torch.ops.aten._to_copy.default
        node.args, node.kwargs = node.args[:1], {"dtype": node.args[1]}


def _name_dimensions(program: Program, model: ir.Model) -> None:
    """Inputs and outputs of one size share its name; torch.export gives each a symbol."""
    names: dict[str, str] = {}
    for spec, value in zip(program.inputs, model.graph.inputs, strict=True):
        for dim, found in zip(spec.dims, value.shape or (), strict=True):
            if isinstance(dim, str) and isinstance(found, ir.SymbolicDim):
                names[str(found)] = dim
        value.shape = ir.Shape(spec.dims)
    for value in model.graph.outputs:
        dims = [names.get(str(d), "total") if isinstance(d, ir.SymbolicDim) else d
                for d in value.shape or ()]
        value.shape = ir.Shape(dims)


def _drop_traces(model: ir.Model) -> None:
    """Forget the exporter's notes on every node and value: stack traces, and larger than codes."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
