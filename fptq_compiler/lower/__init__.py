"""From a frozen program to a checked file: translate, pack, write, count kernels, compare."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.audit import audit
from fptq_compiler.lower.contract import (
    ACCURACY_LEVEL,
    arithmetic_of,
    count_kernels,
    optimized_graph,
)
from fptq_compiler.lower.expand import expand
from fptq_compiler.lower.export import to_onnx
from fptq_compiler.lower.float_type import convert
from fptq_compiler.lower.packing import pack_int4
from fptq_compiler.lower.parity import check_half_parity, check_parity
from fptq_compiler.lower.share import share_equal
from fptq_compiler.lower.targets import Target, float_type_of, target_of
from fptq_compiler.lower.write import publish, save, staging
from fptq_compiler.memory import collect_cycles
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.runtime.session_file import SessionFile, write_session_file

ELEMENT_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
BFLOAT16_WORDS = (
    "bfloat16 was compared in float32, before the conversion: ONNX Runtime's CPU provider has no "
    "kernels for it"
)


def lower(
    program: Program,
    output: Path,
    recipe: Recipe,
    report: Report,
    *,
    probe: Tensor,
    force: bool,
    language: SessionFile,
    progress: Progress,
) -> None:
    """Write `output` and fill the report's audit, parity and sizes.

    Args:
        program: frozen, or in float throughout.
        output: the ONNX file; it appears whole or not at all.
        recipe: what was asked for; it travels in the file's metadata.
        report: gets stages, audit, parity and sizes.
        probe: token ids (B, S) for the comparison with ONNX Runtime.
        language: what the session file says of texts: context and special ids.
        force: write the file although it fails the check, and say so.
        progress: one step a stage.

    Raises:
        LoweringError: the file cannot be made, loaded or written.
        VerificationError: it is not the program; nothing is written.
    """
    target, float_type = target_of(recipe.target), float_type_of(recipe)
    progress.start("lowering to ONNX", 3)
    with staging(output) as folder:
        staged = folder / output.name
        metadata = _metadata(program, report, recipe)
        # In half precision the same forms are written in float32 first, to be compared exactly.
        exact = staged if float_type == "float32" else folder / "float32.onnx"
        with report.stage("lower"):
            model = to_onnx(program, target)
            weights = {f"{q.parameter}_codes" for q in program.weight_quantizers}
            if exact != staged:
                twin = finish(model.clone(), target, ir.DataType.FLOAT, weights)
                save(twin, exact, metadata, target.ir_version)
                del twin
            model = finish(model, target, ELEMENT_TYPES[float_type], weights)
            report.audit = audit(program, model, recipe.bits.weights, recipe.head_bits)
            save(model, staged, metadata, target.ir_version)
            del model
            progress.advance(1, "written")
        with report.stage("check against ONNX Runtime"):
            runnable = exact if float_type == "bfloat16" else staged
            optimized = optimized_graph(runnable, folder, target.session_config)
            written = InlinePass()(ir.load(staged)).model
            failures = target.contract(program, written, optimized)
            kernels, _ = count_kernels(optimized)
            del written, optimized
            collect_cycles()
            progress.advance(1, "kernels counted")
            parity = check_parity(program, exact, probe, folder, target.session_config)
            failures += parity.failures()
            report.parity.update(parity.to_dict())
            if float_type == "float16":
                half = check_half_parity(program, staged, probe, folder, target.session_config)
                failures += [f"in float16 {words}" for words in half.failures()]
                report.parity.update({f"float16: {k}": v for k, v in half.to_dict().items()})
            report.parity["kernels"] = ", ".join(f"{n} {k}" for k, n in kernels.most_common())
            progress.advance(1, "compared")
        if float_type == "bfloat16":
            report.decisions.append(BFLOAT16_WORDS)
        failures += [
            f"{row.kind}: asked for {row.requested}, the file holds {row.written}"
            for row in report.audit
            if not row.as_requested
        ]
        if failures and not force:
            lines = "\n".join(f"  {f}" for f in failures)
            message = (
                f"the written file is not what was compiled, so nothing was written:\n{lines}\n"
                "Report this with the model; --force writes the file all the same."
            )
            raise VerificationError(message)
        arithmetic = arithmetic_of(recipe)
        if arithmetic is not None:
            report.decisions.append(f"linears: {arithmetic}; the file was checked at level 1")
        level = {ACCURACY_LEVEL: str(recipe.weights.matmulnbits_accuracy_level)}
        report.decisions += [f"WRITTEN BY --force ALTHOUGH: {f}" for f in failures]
        write_session_file(staged, replace(
            language, target=target.name, providers=target.providers,
            session_config={**target.session_config, **level}, arithmetic=arithmetic,
        ))
        report.size_after = publish(staged, output)
    progress.done()


def finish(
    model: ir.Model, target: Target, float_type: ir.DataType, weights: Collection[str]
) -> ir.Model:
    """Give an exported model the float type and the forms of the target, in place.

    Args:
        model: as the exporter gives it.
        target: the forms.
        float_type: what the file computes in.
        weights: names of the codes, each of which keeps a tensor of its own.
    """
    if float_type != ir.DataType.FLOAT:
        convert(model, float_type)
    expand(model, target.expansions, float_type.value)
    called = {n.op_identifier() for n in model.graph.all_nodes()}
    for make in target.functions:
        function = make(target.opset)
        if function.identifier() in called:
            model.functions[function.identifier()] = function
    model.opset_imports[""] = target.opset
    pack_int4(model)
    share_equal(model, weights)
    return model


def _metadata(program: Program, report: Report, recipe: Recipe) -> dict[str, str]:
    """What travels in the file: recipe, seed, versions, origin."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    heads = {str(s.heads) for s in program.sites.attention}
    return {
        "fptq.heads": ", ".join(sorted(heads)),
        "fptq.recipe": recipe.to_toml(),
        "fptq.seed": str(recipe.seed),
        "fptq.versions": versions,
        "fptq.origin": report.origin,
        "fptq.target": recipe.target,
        "fptq.dtype": float_type_of(recipe),
    }
