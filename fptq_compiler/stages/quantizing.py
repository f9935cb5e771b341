"""From folded weights to integers: quantisers, ranges, training, codes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fptq_compiler.graph.pipeline import Pass
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.targets import float_type_of, target_of
from fptq_compiler.optimize.calibrate import Calibration, calibrate_activations, calibrate_weights
from fptq_compiler.optimize.mean_shift import mean_shifts
from fptq_compiler.optimize.round_weights import Rounding, round_weights
from fptq_compiler.passes.correct_bias import CorrectBias
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.place_quantizers import FLOAT_BITS, PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from fptq_compiler.passes.round_scales import RoundScales
from fptq_compiler.passes.settle_bias import SettleBias
from fptq_compiler.passes.track_bias import TrackBias
from fptq_compiler.progress import Progress
from fptq_compiler.quant.modules import WeightFakeQuantizer
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.stages.measuring import TRAINED, TRANSFORMED, Measurements
from fptq_compiler.stages.proof import run_proved
from fptq_compiler.stages.training import TrainingStage


def needs_calibration(recipe: Recipe) -> bool:
    """Whether anything is found from activations, or trained on text."""
    if recipe.bits.activations != FLOAT_BITS or recipe.bits.cache != FLOAT_BITS or recipe.trains:
        return True
    if recipe.bits.weights != FLOAT_BITS and recipe.weights.bias_correction:
        return True
    if recipe.rounds_by_gptq:
        return True
    if "smooth" in recipe.transforms.candidates:
        return True
    return recipe.local.objective == "activations" and recipe.local.steps > 0


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
    with report.stage("quantise"):
        find_ranges(
            program, recipe, ids, report, progress,
            trained=training is not None, dump_dir=dump_dir,
        )
    if measurements is not None:
        measurements.plain(quantizer_placement(recipe))
        measurements.signal(program, TRANSFORMED)
    if training is not None:
        training.run(program, recipe, report, progress)
        run_proved(program, (FoldTransforms(), SettleBias()), None, dump_dir)
        if measurements is not None:
            measurements.signal(program, TRAINED)
    if measurements is not None:
        measurements.sensitivity(program)
    with report.stage("freeze"):
        steps: list[Pass] = [FreezeQuantizers()]
        float_type = float_type_of(recipe)
        if float_type != "float32":
            steps.append(RoundScales(getattr(torch, float_type)))
        run_proved(program, tuple(steps), None, dump_dir)


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


def find_ranges(
    program: Program,
    recipe: Recipe,
    ids: Tensor | None,
    report: Report,
    progress: Progress,
    *,
    trained: bool = False,
    dump_dir: Path | None = None,
) -> None:
    """Place the quantisers and find their ranges; sinks and biases are corrected.

    Args:
        program: as `transform` leaves it; rewritten in place.
        recipe: bits and norms.
        ids: calibration tokens (samples, length); None where no activation is quantised.
        report: gets signal-to-noise ratios and decisions.
        progress: listens.
        trained: the stages that train follow: biases move with the weights.
        dump_dir: an existing folder for the graph after each pass.
    """
    run_proved(program, (quantizer_placement(recipe),), None, dump_dir)
    report.sqnr.update(calibrate_weights(program, recipe.weights.p, progress))
    steps: list[Pass] = []
    if ids is not None:
        found = calibrate_activations(
            program,
            _sequences(ids),
            p=recipe.activations.p,
            sinks=recipe.activations.sinks,
            progress=progress,
        )
        report.sqnr.update(found.sqnr)
        means = found.means
        if recipe.rounds_by_gptq:
            rounding = _round(program, recipe, ids, found, report, progress)
            steps.append(CorrectBias(rounding.shifts))
            if trained and recipe.training.weights == "none":
                _keep_codes(program, rounding)
            means = {name: (quantized, quantized) for name, (_, quantized) in means.items()}
        elif recipe.weights.bias_correction and not trained:
            steps.append(CorrectBias(mean_shifts(program, means)))
        if recipe.weights.bias_correction and trained:
            steps.append(TrackBias(means))
        steps.append(ProtectFirstPosition(found.first_position))
        report.decisions.append(_sink_words(recipe.activations.sinks, found.first_position))
    program.facts.add("calibrated")
    run_proved(program, tuple(steps), None, dump_dir)


def _sequences(ids: Tensor | None) -> list[Tensor]:
    """Each token sequence as a batch of one."""
    return [] if ids is None else [row.unsqueeze(0) for row in ids]


def _round(
    program: Program,
    recipe: Recipe,
    ids: Tensor,
    found: Calibration,
    report: Report,
    progress: Progress,
) -> Rounding:
    """Round the weights by GPTQ."""
    with report.stage("round weights"):
        rounding = round_weights(
            program, _sequences(ids), found,
            correct_bias=recipe.weights.bias_correction, progress=progress,
        )
    report.sqnr.update(rounding.sqnr)
    report.decisions.append(f"GPTQ rounded {len(rounding.sqnr)} weights")
    return rounding


def _keep_codes(program: Program, rounding: Rounding) -> None:
    """Train the scales of rounded weights, not their codes."""
    for record in program.weight_quantizers:
        if record.parameter in rounding.sqnr:
            module = program.module.get_submodule(record.module)
            assert isinstance(module, WeightFakeQuantizer)
            module.keep_codes()


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
