"""Which transforms a model keeps, by held-out loss: each has to be worth its place.

Starting from all that apply, one after another is left out, and S_n is tried at every place, in
short trials of the whole way: transforms, ranges, a few training steps. What lowers the loss on
held-out text is kept for the trials that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from fptq_compiler.graph.program import Program
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.recipe_parts import TRANSFORMS
from fptq_compiler.report import Report
from fptq_compiler.trial import freeze, trial
from fptq_compiler.work import WorkFolder

PLACES = (("down_proj",), ("o_proj",), ("down_proj", "o_proj"))

Loss = Callable[[Recipe], float]


def choose_kinds(
    program: Program, recipe: Recipe, ids: Tensor, rows: Tensor, report: Report,
    progress: Progress, *, work: WorkFolder,
) -> Recipe:
    """The recipe with the transforms and places of S_n that lower the held-out loss.

    Args:
        program: as captured; left as it is.
        recipe: how it is compiled, and by `transforms.trial_steps` how long a trial trains.
        ids: calibration tokens (samples, length).
        rows: training tokens (N, S).
        report: gets a decision for every trial.
        progress: one step a trial.
        work: keeps the losses, for a run that goes on.
    """
    losses = work.load_trials(ids, rows)

    def loss(variant: Recipe) -> float:
        name = variant.to_toml()
        if name not in losses:
            losses[name] = _trial_loss(program.copy(), variant, ids, rows)
            work.save_trials(ids, rows, losses)
        progress.advance(1, f"held out {losses[name]:.4f}")
        return losses[name]

    progress.start("choosing transforms", 1 + len(list(variants(recipe))))
    chosen, decisions = choose(recipe, loss)
    progress.done()
    report.decisions.extend(decisions)
    return chosen


def choose(recipe: Recipe, loss: Loss) -> tuple[Recipe, list[str]]:
    """Greedy: every variant is tried on what was best so far; gives it, and a sentence each."""
    best, least = recipe, loss(recipe)
    decisions = [f"trial of {', '.join(recipe.transforms.candidates)}: held-out loss {least:.4f}"]
    for words, change in variants(recipe):
        variant = change(best)
        if variant == best:
            continue
        found = loss(variant)
        better = found < least
        verdict = "chosen" if better else f"not chosen, {least:.4f} without this change"
        decisions.append(f"trial {words}: held-out loss {found:.4f}, {verdict}")
        if better:
            best, least = variant, found
    return best, decisions


def variants(recipe: Recipe) -> Iterator[tuple[str, Callable[[Recipe], Recipe]]]:
    """In words, and as a change of a recipe: another place of S_n, a transform less."""
    if "scaling" in recipe.transforms.candidates:
        for places in PLACES:
            yield f"with scaling at {' and '.join(places)}", _places(places)
    for name in recipe.transforms.candidates:
        yield f"without {name}", _without(name)


def _places(places: tuple[str, ...]) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, transforms=replace(recipe.transforms, scaling_places=places))

    return change


def _without(name: str) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        left = tuple(n for n in TRANSFORMS if n in recipe.transforms.candidates and n != name)
        return replace(recipe, transforms=replace(recipe.transforms, names=left))

    return change


def _trial_loss(program: Program, recipe: Recipe, ids: Tensor, rows: Tensor) -> float:
    """The least held-out loss of a short training."""
    chosen = trial(recipe)
    training = replace(chosen.training, steps=recipe.transforms.trial_steps)
    found = freeze(program, replace(chosen, training=training), ids, rows)
    return min(found.curves["end to end, held out"])
