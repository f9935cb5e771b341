"""The order of everything: from a captured model to a checked ONNX file and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fptq_compiler.calibration import calibration_ids, training_rows
from fptq_compiler.capture import capture, load_example_inputs
from fptq_compiler.capture.source import Captured
from fptq_compiler.choice import choose_transforms
from fptq_compiler.drawing.make import Draft, make_scene
from fptq_compiler.drawing.page import check_form, write_drawing
from fptq_compiler.explain import (
    AsFound,
    explain_misses,
    explain_quantizers,
    explain_sites,
    prepare,
)
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import identity
from fptq_compiler.inspection import ExportCost, Inspection
from fptq_compiler.lower import lower
from fptq_compiler.lower.targets import float_type_of
from fptq_compiler.lower.write import staging
from fptq_compiler.memory import collect_cycles
from fptq_compiler.optimize.ranks import leave_ranks
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.progress import Progress, SilentProgress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report, StageRow, collect_versions
from fptq_compiler.report_page.write import check_reports, write_report
from fptq_compiler.runtime.session_file import SessionFile
from fptq_compiler.stage_clock import StageClock
from fptq_compiler.stages import (
    cache,
    look_into,
    needs_calibration,
    quantize,
    refuse_without_sites,
    take_in,
    transform,
    vocabulary_of,
)
from fptq_compiler.stages.measuring import Measurements
from fptq_compiler.stages.training import TrainingStage
from fptq_compiler.summary import site_rows
from fptq_compiler.unrecognised import unrecognised
from fptq_compiler.work import WorkFolder


@dataclass(frozen=True)
class Options:
    """What a compilation needs beside its recipe: where things lie and how much is allowed.

    Each of `reports` ends with .html or .json; with `quick_report` they leave out what needs
    further runs of the model.

    `reference` is where the frozen program's logits are written, with the token ids that they
    belong to, as an .npz: a file can then be compared on a machine that has no torch.
    """

    recipe: Recipe = field(default_factory=Recipe)
    calibration: Path | None = None
    tokenizer: Path | None = None
    device: str = "cpu"
    work_dir: Path | None = None
    reports: tuple[Path, ...] = ()
    quick_report: bool = False
    dump_dir: Path | None = None
    force: bool = False
    trust_pickle: bool = False
    example_inputs: Path | None = None
    reference: Path | None = None


def compile_file(model: Path, output: Path, options: Options, progress: Progress) -> Report:
    """Compile a model file or folder; the command line's work.

    Raises:
        FptqError: whatever is the user's to mend; see `fptq_compiler.errors`.
    """
    float_type_of(options.recipe)
    check_reports(options.reports)
    report = _new_report(model.name, options.recipe)
    with staging(output) as folder:
        with report.stage("capture"):
            example = options.example_inputs
            examples = load_example_inputs(example) if example else None
            source = _take(
                capture(
                    model, trust_pickle=options.trust_pickle, example_inputs=examples, unread=True
                ),
                options.recipe, folder,
            )
        return _compile(source, output, options, progress, report)


def compile_model(
    model: nn.Module | ExportedProgram,
    output: str | Path,
    *,
    options: Options | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compile a module or exported program from Python.

    Args:
        model: a transformers causal LM, any module (with `example_inputs`), or an export of one.
        output: the ONNX file to write.
        options: recipe and files; the default recipe if None.
        example_inputs: token ids (B, S) and whatever else `forward` takes.
        progress: listens to long work.

    Raises:
        FptqError: whatever is the user's to mend.
    """
    options = options or Options()
    float_type_of(options.recipe)
    check_reports(options.reports)
    report = _new_report(type(model).__name__, options.recipe)
    with report.stage("capture"):
        source = _take(capture(model, example_inputs=example_inputs), options.recipe, None)
    return _compile(source, Path(output), options, progress or SilentProgress(), report)


def _new_report(origin: str, recipe: Recipe) -> Report:
    return Report(origin=origin, recipe=recipe.to_toml(), seed=recipe.seed)


@dataclass(frozen=True)
class _Source:
    """What is kept of a captured model; the exported program, and its weights, are let go."""

    program: Program
    tokenizer: Path | None
    start: int | None
    language: SessionFile


def _take(captured: Captured, recipe: Recipe, folder: Path | None) -> _Source:
    program = take_in(
        captured.program, cached=recipe.cache.enabled, sources=captured.sources, folder=folder
    )
    language = SessionFile(
        context_length=captured.context_length,
        bos_token_id=captured.generation_start,
        eos_token_ids=captured.text_ends,
    )
    return _Source(program, captured.tokenizer, captured.generation_start, language)


def _compile(
    source: _Source, output: Path, options: Options, progress: Progress, report: Report
) -> Report:
    recipe = options.recipe
    program, start = source.program, source.start
    tokenizer = options.tokenizer or source.tokenizer
    report.size_before = _parameter_bytes(program)
    vocabulary = vocabulary_of(program)
    work = WorkFolder(options.work_dir, recipe, program, options.device)
    if options.dump_dir is not None:
        options.dump_dir.mkdir(parents=True, exist_ok=True)

    def tokens() -> Tensor:
        with report.stage("calibration tokens"):
            ids, origin = calibration_ids(
                program, options.calibration, tokenizer, recipe, vocabulary, start, work, progress
            )
        report.decisions.append(f"calibrated on {ids.shape[0]} x {ids.shape[1]} tokens, {origin}")
        return ids

    found = tokens() if needs_calibration(recipe) else None
    ids = None if found is None else found[: recipe.calibration.samples]
    collect_cycles()  # exported programs and graphs hold cycles, and cycles hold weights
    program.move(options.device)
    rows = None
    if found is not None and recipe.trains:
        rows = training_rows(options.calibration, tokenizer, recipe, vocabulary, found)
    if rows is not None and ids is not None and recipe.transforms.choose:
        recipe = choose_transforms(program, recipe, ids, rows, report, progress, work=work)
        report.recipe = recipe.to_toml()
    measured = ids is not None and bool(options.reports) and not options.quick_report
    untrained = transform(
        program, recipe, ids, report, progress, work=work, measured=measured,
        dump_dir=options.dump_dir,
    )
    training = None
    if rows is not None and ids is not None and untrained is not None:
        training = TrainingStage(
            untrained.original, untrained.transformed, untrained.maps, rows,
            work.training(ids, rows),
        )
    measurements = None
    if measured and ids is not None and untrained is not None:
        measurements = Measurements(
            untrained.original, untrained.transformed, ids, recipe, report, progress
        )
    quantize(
        program, recipe, ids, report, progress, training=training, measurements=measurements,
        dump_dir=options.dump_dir,
    )
    if not leave_ranks():
        return report
    program.move("cpu")
    language = source.language
    if recipe.cache.enabled:
        length = cache(
            program, recipe, language.context_length, report, dump_dir=options.dump_dir
        )
        language = replace(language, context_length=length)
    collect_cycles()
    report.sites = site_rows(program)
    report.near_misses = [str(m) for m in program.near_misses]
    report.decisions = program.decisions + report.decisions
    probe = _probe(ids, vocabulary, recipe)
    if options.reference is not None:
        np.savez(options.reference, ids=probe.numpy(), logits=program.run(probe).numpy())
    lower(program, output, recipe, report, probe=probe,
          force=options.force, language=language, progress=progress)
    for path in options.reports:
        write_report(report, path)
    return report


def _probe(ids: Tensor | None, vocabulary: int, recipe: Recipe) -> Tensor:
    """Token ids (2, 32) for the comparison with ONNX Runtime."""
    if ids is not None and ids.shape[0] > 1:
        return ids[:2, :32]
    generator = torch.Generator().manual_seed(recipe.seed)
    return torch.randint(vocabulary, (2, 32), generator=generator)


def _parameter_bytes(program: Program) -> int:
    return sum(p.nbytes for p in _unique_parameters(program))


def _unique_parameters(program: Program) -> list[Tensor]:
    """The parameters, each memory once: tied ones share theirs."""
    return list({identity(p): p for p in program.module.parameters()}.values())


def inspect_file(
    model: Path,
    *,
    trust_pickle: bool = False,
    example_inputs: Path | None = None,
    graph: Path | None = None,
) -> Inspection:
    """Find the sites of a model and what they allow, without compiling it.

    Args:
        model: file or folder.
        trust_pickle: allow loading that runs code from the file.
        example_inputs: token ids for a pickled module.
        graph: an .html or .svg to draw the model to.

    Raises:
        FptqError: the model cannot be read, or has no site at all; the drawing cannot be written.
    """
    if graph is not None:
        check_form(graph)
    rows: list[StageRow] = []
    examples = load_example_inputs(example_inputs) if example_inputs else None
    with StageClock("capture", rows):
        captured = capture(
            model, trust_pickle=trust_pickle, example_inputs=examples, unread=True
        )
    program = look_into(captured.program, sources=captured.sources)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    numbers = sum(p.numel() for p in _unique_parameters(program))
    cost = ExportCost(rows[0].seconds, nodes, numbers, _parameter_bytes(program))
    run_passes(program, FIND_SITES)
    refuse_without_sites(program)
    unknown, as_found = unrecognised(program), AsFound.of(program)
    draft = Draft(program) if graph is not None else None
    prepare(program, Recipe())
    found = Inspection(
        model=model.name,
        export=cost,
        sites=explain_sites(program, as_found),
        near_misses=explain_misses(program),
        unrecognised=tuple(unknown),
        quantizers=explain_quantizers(program),
        versions=collect_versions(),
    )
    if graph is not None and draft is not None:
        write_drawing(make_scene(draft, program, found), graph)
    return found


def original_logits(
    model: Path, *, trust_pickle: bool = False
) -> tuple[Callable[[Tensor], Tensor], Path | None]:
    """The unquantised model as a function of token ids, and where its tokenizer lies."""
    captured = capture(model, trust_pickle=trust_pickle, unread=True)
    program = take_in(captured.program, sources=captured.sources)
    return program.run, captured.tokenizer


__all__ = [
    "Options", "compile_file", "compile_model", "inspect_file", "original_logits",
]
