"""From capture to folded weights: sites, transforms, local optimisation, fold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fptq_compiler.errors import RecipeError, UnsupportedModelError
from fptq_compiler.graph.foreign import refuse_custom_operators
from fptq_compiler.graph.pipeline import Pass
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import Verifier
from fptq_compiler.lower.targets import target_of
from fptq_compiler.optimize.inputs import map_inputs
from fptq_compiler.optimize.local import optimize_locally
from fptq_compiler.optimize.smooth import set_smoothing
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.carry_epsilon import CarryEpsilon
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline, online_operations
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.stages.proof import run_proved
from fptq_compiler.stages.taking_in import vocabulary_of
from fptq_compiler.stages.training import trained_maps
from fptq_compiler.summary import applied_transforms
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
        ids: calibration tokens (samples, length), where the objective may take activations.
        report: gets stages, curves and the errors that verification measured.
        progress: listens.
        work: keeps trained transforms, for a run that goes on.
        measured: whether the result is to be measured for the report.
        dump_dir: an existing folder for the graph after each pass.

    Returns:
        What the stages that train and the measurements need, where there are any.
    """
    verifier = find_sites(program, recipe, report, dump_dir=dump_dir)
    original = program.copy() if recipe.trains or measured else None
    insert_transforms(
        program, recipe, ids, report, progress, verifier=verifier, work=work, dump_dir=dump_dir
    )
    with report.stage("fold"):
        maps = trained_maps(program, recipe)
        folding: list[Pass] = [FoldTransforms(maps), FreezeOnline()]
        if target_of(recipe.target).epsilon_channel and program.maps.get("residual") not in maps:
            folding.append(CarryEpsilon())
        run_proved(program, tuple(folding), verifier, dump_dir)
        report.online_operations = online_operations(program)
    if verifier is not None:
        report.preserved.update(verifier.errors)
    return Untrained(original, program.copy(), maps) if original is not None else None


def find_sites(
    program: Program, recipe: Recipe, report: Report, *, dump_dir: Path | None = None
) -> Verifier | None:
    """Find where transforms may act; gives what proves the passes, unless verification is off.

    Raises:
        UnsupportedModelError: no transformer, a custom operator, or too much that is unknown.
        RecipeError: the recipe leaves a transform out where none could be.
    """
    verifier: Verifier | None = None
    with report.stage("find sites"):
        if recipe.verify != "off":
            tokens = 64 if recipe.verify == "full" else 16
            verifier = Verifier(program, vocabulary_of(program), recipe.seed, tokens=tokens)
        run_proved(program, FIND_SITES, verifier, dump_dir)
        refuse_without_sites(program)
        refuse_custom_operators(program)
        report.unrecognised = unrecognised(program)
        if report.unrecognised:
            places = dict.fromkeys(row.place for row in report.unrecognised)
            logger.warning("not recognised: %s", ", ".join(places))
        demanded = () if recipe.transforms.where_possible else recipe.transforms.candidates
        refuse_unrecognised(demanded, report.unrecognised)
        _leave_out(program, recipe.transforms.left_out)
    return verifier


def insert_transforms(
    program: Program,
    recipe: Recipe,
    ids: Tensor | None,
    report: Report,
    progress: Progress,
    *,
    verifier: Verifier | None = None,
    work: WorkFolder | None = None,
    dump_dir: Path | None = None,
) -> None:
    """Put the maps on their edges and optimise them locally; arguments as for `transform`."""
    with report.stage("insert transforms"):
        run_proved(program, transform_insertion(recipe), verifier, dump_dir)
        _refuse_missing(program, recipe)
    if "smooth" in recipe.transforms.candidates and ids is not None:
        with report.stage("smooth activations"):
            set_smoothing(program, [ids], recipe.transforms.smooth_alpha, progress)
    with report.stage("local optimisation"):
        report.curves.update(_optimize(program, recipe, ids, work, progress))


def transform_insertion(recipe: Recipe) -> tuple[Pass, ...]:
    """The passes that insert the transforms of a recipe."""
    return insertion(
        recipe.transforms.candidates,
        seed=recipe.seed,
        scaling_places=recipe.transforms.scaling_places,
        hadamard_block=recipe.hadamard_block,
        value_map=recipe.transforms.value_map,
    )


def _leave_out(program: Program, names: Sequence[str]) -> None:
    """Refuse the named transforms, each as `transform.site`."""
    refused = {site.name: site.refused for site in program.sites.attention}
    refused |= {site.name: site.refused for site in program.sites.mlp}
    for name in names:
        transform, _, place = name.partition(".")
        if place not in refused:
            message = (
                f"transforms.left_out has {name!r}, but this model has no site {place!r}; its "
                f"sites are {', '.join(refused)}"
            )
            raise RecipeError(message)
        refused[place].setdefault(transform, "left out by the recipe")


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
        if recipe.local.objective != "weights" and ids is not None:
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
