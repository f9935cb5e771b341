"""From a frozen program to a checked file: translate, pack, write, count kernels, compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.audit import audit
from fptq_compiler.lower.contract import (
    ACCURACY_LEVEL,
    arithmetic_of,
    contract_of,
    optimized_kernels,
)
from fptq_compiler.lower.expand import expand
from fptq_compiler.lower.export import to_onnx
from fptq_compiler.lower.packing import pack_int4
from fptq_compiler.lower.parity import check_parity
from fptq_compiler.lower.share import share_equal
from fptq_compiler.lower.targets import target_of
from fptq_compiler.lower.write import publish, save, staging
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.runtime.session_file import SessionFile, write_session_file


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
    target = target_of(recipe.target)
    progress.start("lowering to ONNX", 3)
    with staging(output) as folder:
        staged = folder / output.name
        with report.stage("lower"):
            model = to_onnx(program, target)
            expand(model, target.expansions)
            model.opset_imports[""] = target.opset
            pack_int4(model)
            share_equal(model, {f"{q.parameter}_codes" for q in program.weight_quantizers})
            report.audit = audit(program, model, recipe.bits.weights, recipe.head_bits)
            save(model, staged, _metadata(program, report, recipe), target.ir_version)
            del model
            progress.advance(1, "written")
        with report.stage("check against ONNX Runtime"):
            kernels, int4 = optimized_kernels(staged, folder, target.session_config)
            failures = contract_of(program).check(kernels, int4)
            progress.advance(1, "kernels counted")
            parity = check_parity(program, staged, probe, folder, target.session_config)
            failures += parity.failures()
            report.parity.update(parity.to_dict())
            report.parity["kernels"] = ", ".join(f"{n} {k}" for k, n in kernels.most_common())
            progress.advance(1, "compared")
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
    }
