"""The stages between capture and lowering: transforms in, folded; quantisers in, frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fptq_compiler.errors import UnsupportedModelError, VerificationError
from fptq_compiler.graph.evaluate import longest_sequence
from fptq_compiler.graph.foreign import refuse_custom_operators
from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import Source, bind_sources
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import Verifier, must_preserve
from fptq_compiler.language_model import refuse_fixed_sizes, refuse_inputs, refuse_outputs
from fptq_compiler.lower.targets import float_type_of, target_of
from fptq_compiler.measurements import TRAINED, TRANSFORMED, Measurements
from fptq_compiler.memory import return_freed_memory
from fptq_compiler.optimize.calibrate import (
    Calibration,
    calibrate_activations,
    calibrate_weights,
)
from fptq_compiler.optimize.inputs import map_inputs
from fptq_compiler.optimize.local import optimize_locally
from fptq_compiler.optimize.mean_shift import mean_shifts
from fptq_compiler.optimize.round_weights import round_weights
from fptq_compiler.optimize.smooth import set_smoothing
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.carry_epsilon import CarryEpsilon
from fptq_compiler.passes.correct_bias import CorrectBias
from fptq_compiler.passes.drop_inputs import DropInputs
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline, online_operations
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.pack_projections import PackProjections
from fptq_compiler.passes.place_quantizers import FLOAT_BITS, PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from fptq_compiler.passes.round_scales import RoundScales
from fptq_compiler.passes.strip_cache import StripCache
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.recipe_parts import LONGEST_CACHE
from fptq_compiler.report import Report
from fptq_compiler.summary import applied_transforms
from fptq_compiler.training_stage import TrainingStage, trained_maps
from fptq_compiler.transforms import Map
from fptq_compiler.unrecognised import refuse_unrecognised, unrecognised
from fptq_compiler.work import WorkFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Untrained:
    """What `transform` leaves to the stages that train and the measurements.

    Attributes:
        original: the model as captured, its sites found.
        transformed: with the transforms; its maps are the program's own.
        maps: those that are still on their edges.
    """

    original: Program
    transformed: Program
    maps: tuple[Map, ...]



def take_in(
    exported: ExportedProgram,
    *,
    cached: bool = False,
    sources: Mapping[str, Source] | None = None,
    folder: Path | None = None,
) -> Program:
    """The record that all stages work on, without the cache that a model was captured with.

    Args:
        exported: as captured.
        cached: whether it gets a cache of ours, which needs token ids as its only input.
        sources: by parameter name where its values lie, if the program holds none.
        folder: where rewritten weights of such a program are kept; None is memory.

    Raises:
        UnsupportedModelError: nothing embeds token ids; a captured cache, or input, that cannot
            be taken out; inputs without a plain value, or of one size; a first output that is
            no logits.
        VerificationError: what is left computes something else.
    """
    program = unlift(exported)
    if sources:
        bind_sources(program.module, sources, folder)
    vocabulary_of(program)
    refuse_outputs(program)
    run_passes(program, (StripCache(),))
    refuse_inputs(program)
    refuse_fixed_sizes(program)
    if cached:
        run_passes(program, (DropInputs(),))
    return program


def look_into(
    exported: ExportedProgram, *, sources: Mapping[str, Source] | None = None
) -> Program:
    """The record for an inspection, whatever the model takes and gives."""
    program = unlift(exported)
    if sources:
        bind_sources(program.module, sources, None)
    run_passes(program, (StripCache(),))
    return program


def needs_calibration(recipe: Recipe) -> bool:
    """Whether anything is found from activations, or trained on text."""
    if recipe.bits.activations != FLOAT_BITS or recipe.bits.cache != FLOAT_BITS or recipe.trains:
        return True
    from_inputs = recipe.weights.bias_correction or recipe.weights.rounding == "gptq"
    if recipe.bits.weights != FLOAT_BITS and from_inputs:
        return True
    if "smooth" in recipe.transforms.candidates:
        return True
    return recipe.local.objective == "activations" and recipe.local.steps > 0


def transform(
    program: Program,
    recipe: Recipe,
    ids: Tensor | None,
    report: Report,
    progress: Progress,
    *,
    work: WorkFolder | None = None,
    measured: bool = False,
    dump_dir: Path | None = None,
) -> Untrained | None:
    """From capture to folded weights: sites, transforms, local optimisation, fold.

    Maps that are to be trained end to end stay on their edges.

    Args:
        program: as `unlift` gives it; rewritten in place, its function preserved.
        recipe: which transforms, and how they are optimised.
        ids: calibration tokens (samples, length), where the objective needs activations.
        report: gets stages, curves and the errors that verification measured.
        progress: listens.
        work: keeps trained transforms, for a run that goes on.
        measured: whether the result is to be measured for the report.
        dump_dir: an existing folder for the graph after each pass.

    Returns:
        What the stages that train and the measurements need, where there are any.
    """
    verifier: Verifier | None = None
    with report.stage("find sites"):
        if recipe.verify != "off":
            tokens = 64 if recipe.verify == "full" else 16
            verifier = Verifier(program, vocabulary_of(program), recipe.seed, tokens=tokens)
        _run(program, FIND_SITES, verifier, dump_dir)
        refuse_without_sites(program)
        refuse_custom_operators(program)
        report.unrecognised = unrecognised(program)
        if report.unrecognised:
            places = dict.fromkeys(row.place for row in report.unrecognised)
            logger.warning("not recognised: %s", ", ".join(places))
        demanded = () if recipe.transforms.where_possible else recipe.transforms.candidates
        refuse_unrecognised(demanded, report.unrecognised)
    original = program.copy() if recipe.trains or measured else None
    with report.stage("insert transforms"):
        steps = insertion(
            recipe.transforms.candidates,
            seed=recipe.seed,
            scaling_places=recipe.transforms.scaling_places,
            hadamard_block=recipe.hadamard_block,
            value_map=recipe.transforms.value_map,
        )
        _run(program, steps, verifier, dump_dir)
        _refuse_missing(program, recipe)
    if "smooth" in recipe.transforms.candidates and ids is not None:
        with report.stage("smooth activations"):
            set_smoothing(program, [ids], recipe.transforms.smooth_alpha, progress)
    with report.stage("local optimisation"):
        report.curves.update(_optimize(program, recipe, ids, work, progress))
    with report.stage("fold"):
        maps = trained_maps(program, recipe)
        folding: list[Pass] = [FoldTransforms(maps), FreezeOnline()]
        if target_of(recipe.target).epsilon_channel and program.maps.get("residual") not in maps:
            folding.append(CarryEpsilon())
        _run(program, tuple(folding), verifier, dump_dir)
        report.online_operations = online_operations(program)
    if verifier is not None:
        report.preserved.update(verifier.errors)
    return Untrained(original, program.copy(), maps) if original is not None else None


def quantize(
    program: Program,
    recipe: Recipe,
    ids: Tensor | None,
    report: Report,
    progress: Progress,
    *,
    training: TrainingStage | None = None,
    measurements: Measurements | None = None,
    dump_dir: Path | None = None,
) -> None:
    """From folded weights to the frozen integer program: quantisers, ranges, training, codes.

    Args:
        program: as `transform` leaves it; frozen in place.
        recipe: bits and norms.
        ids: calibration tokens (samples, length); None where no activation is quantised.
        report: gets the stage, signal-to-noise ratios and decisions.
        progress: listens.
        training: the stages that train; None leaves them out.
        measurements: looks at the program between the stages, for the report.
        dump_dir: an existing folder for the graph after each pass.
    """
    batches = [] if ids is None else [row.unsqueeze(0) for row in ids]
    rounds = bool(batches) and recipe.bits.weights != FLOAT_BITS and (
        recipe.weights.rounding == "gptq"
    )
    with report.stage("quantise"):
        _run(program, (quantizer_placement(recipe),), None, dump_dir)
        report.sqnr.update(calibrate_weights(program, recipe.weights.p, progress))
        steps: list[Pass] = []
        if ids is not None:
            found = calibrate_activations(
                program,
                batches,
                p=recipe.activations.p,
                sinks=recipe.activations.sinks,
                progress=progress,
            )
            report.sqnr.update(found.sqnr)
            shifts: dict[str, Tensor] = {}
            if training is None and rounds:
                shifts = _round(program, recipe, batches, found, report, progress)
            elif recipe.weights.bias_correction:
                shifts = mean_shifts(program, found.means)
            if shifts:
                steps.append(CorrectBias(shifts))
            steps.append(ProtectFirstPosition(found.first_position))
            report.decisions.append(_sink_words(recipe.activations.sinks, found.first_position))
        program.facts.add("calibrated")
        _run(program, tuple(steps), None, dump_dir)
    if measurements is not None:
        measurements.plain(quantizer_placement(recipe))
        measurements.signal(program, TRANSFORMED)
    if training is not None:
        training.run(program, recipe, report, progress)
        _run(program, (FoldTransforms(),), None, dump_dir)
        if rounds:
            _round(program, recipe, batches, Calibration(), report, progress)
        if measurements is not None:
            measurements.signal(program, TRAINED)
    if measurements is not None:
        measurements.sensitivity(program)
    with report.stage("freeze"):
        steps = [FreezeQuantizers()]
        float_type = float_type_of(recipe)
        if float_type != "float32":
            steps.append(RoundScales(getattr(torch, float_type)))
        _run(program, tuple(steps), None, dump_dir)


def _round(
    program: Program,
    recipe: Recipe,
    batches: Sequence[Tensor],
    found: Calibration,
    report: Report,
    progress: Progress,
) -> dict[str, Tensor]:
    """Round the weights by GPTQ; gives the shifts that biases correct, where means are found."""
    with report.stage("round weights"):
        rounding = round_weights(
            program, batches, found,
            correct_bias=recipe.weights.bias_correction and bool(found.means), progress=progress,
        )
    report.sqnr.update(rounding.sqnr)
    report.decisions.append(f"GPTQ rounded {len(rounding.sqnr)} weights")
    return rounding.shifts


def quantizer_placement(recipe: Recipe) -> PlaceQuantizers:
    """The pass that places the quantisers of a recipe."""
    return PlaceQuantizers(
        weights=recipe.bits.weights,
        activations=recipe.bits.activations,
        cache=recipe.bits.cache,
        block=recipe.weights.block,
        embedding_bits=recipe.embedding_bits,
        head_bits=recipe.head_bits,
        stored_cache=recipe.cache.enabled,
        channel_scales=recipe.channel_scales,
        symmetric=target_of(recipe.target).symmetric_activations,
    )


def cache(
    program: Program, recipe: Recipe, context: int | None, report: Report,
    *, dump_dir: Path | None = None,
) -> int:
    """From whole sequences to past and present; gives the tokens that the cache may hold.

    Args:
        program: frozen; rewritten in place.
        recipe: how long the cache may become.
        context: the model's own context in tokens, where it is known.
        report: gets the stage.
        dump_dir: an existing folder for the graph after the pass.

    Raises:
        UnsupportedModelError: an attention that a cache cannot follow, or too long a cache.
    """
    bound = longest_sequence(program.module)
    if bound is not None and recipe.cache.max_length > bound:
        message = (
            f"--max-length {recipe.cache.max_length}: the model was exported for at most {bound} "
            f"tokens; give at most {bound}, or export it with a larger bound"
        )
        raise UnsupportedModelError(message)
    most = min(LONGEST_CACHE, context or LONGEST_CACHE, bound or LONGEST_CACHE)
    length = recipe.cache.max_length or most
    with report.stage("add cache"):
        steps: list[Pass] = [AddCache(length)]
        if target_of(recipe.target).packed_projections:
            steps.append(PackProjections())
        _run(program, tuple(steps), None, dump_dir)
    return length


def vocabulary_of(program: Program) -> int:
    """Rows of the first embedding table.

    Raises:
        UnsupportedModelError: nothing embeds token ids.
    """
    for node in program.call_nodes(torch.ops.aten.embedding.default):
        table = node.args[0]
        if isinstance(table, torch.fx.Node):
            return int(table.meta["val"].shape[0])
    message = (
        "the graph embeds no token ids, so there is no transformer language model in it; "
        "expected an embedding, attention and linear layers"
    )
    raise UnsupportedModelError(message)


def refuse_without_sites(program: Program) -> None:
    """Raise UnsupportedModelError where neither attention nor an MLP was found."""
    if not program.sites.attention and not program.sites.mlp:
        message = (
            "no attention and no MLP was found in the graph, expected a transformer; "
            "run fptq-inspect for what came closest"
        )
        raise UnsupportedModelError(message, [str(m) for m in program.near_misses])


def _refuse_missing(program: Program, recipe: Recipe) -> None:
    if recipe.transforms.where_possible:
        return
    applied = applied_transforms(program)
    missing = [n for n in recipe.transforms.candidates if n not in applied]
    if missing:
        message = (
            f"the recipe demands {', '.join(missing)}, which no site of this model allows; "
            "leave it out of --transforms, or use --transforms auto"
        )
        raise UnsupportedModelError(message, [str(m) for m in program.near_misses])


def _run(
    program: Program, steps: Sequence[Pass], verifier: Verifier | None, dump_dir: Path | None
) -> None:
    """Run passes, and prove that the function is preserved.

    Passes that round are proved one by one, all between two of them by one run of the model. If
    that fails they run again, each with its own proof, so that the error names the wrong one.
    """
    before = None
    if verifier is not None and not all(step.rounds for step in steps):
        before = program.copy()
    following = dict(pairwise((*steps, None)))
    unproved: list[Pass] = []

    def observe(step: Pass, result: PassResult) -> None:
        if must_preserve(step, result):
            unproved.append(step)
        after = following[step]
        if verifier is not None and (after is None or after.rounds or step.rounds):
            verifier.check_together(program, unproved)
            unproved.clear()
        return_freed_memory()

    try:
        run_passes(program, steps, observe=observe, dump_dir=dump_dir)
    except VerificationError:
        if verifier is not None and before is not None and len(unproved) > 1:
            run_passes(before, steps, observe=partial(verifier.check, before))
        raise


def _optimize(
    program: Program,
    recipe: Recipe,
    ids: Tensor | None,
    work: WorkFolder | None,
    progress: Progress,
) -> dict[str, list[float]]:
    """Local optimisation, or its result from the work folder."""
    if not program.maps or recipe.local.steps == 0:
        return {}
    curves = work.load_maps(program, ids) if work is not None else None
    if curves is None:
        activations = None
        if recipe.local.objective == "activations" and ids is not None:
            activations = map_inputs(program, [ids])
        curves = optimize_locally(
            program,
            steps=recipe.local.steps,
            learning_rate=recipe.local.learning_rate,
            p=recipe.local.p,
            residual_learned=recipe.transforms.residual_learned,
            seed=recipe.seed,
            progress=progress,
            activations=activations,
        )
        if work is not None:
            work.save_maps(program, ids, curves)
    return curves


def _sink_words(sinks: str, factors: dict[str, float]) -> str:
    if sinks == "none":
        return "first-token sinks: not treated, one static range for all positions"
    if not factors:
        return "first-token sinks: none found, position 0 is like the others"
    listed = ", ".join(f"{name} (1/{1 / factor:.0f})" for name, factor in factors.items())
    return (
        f"first-token sinks: position 0 has a static range of its own at {len(factors)} linear "
        f"inputs: {listed}"
    )
