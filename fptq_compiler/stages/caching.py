"""From whole sequences to past and present."""

from __future__ import annotations

from pathlib import Path

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.evaluate import longest_sequence
from fptq_compiler.graph.pipeline import Pass
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.targets import target_of
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.pack_projections import PackProjections
from fptq_compiler.recipe import Recipe
from fptq_compiler.recipe_parts import LONGEST_CACHE
from fptq_compiler.report import Report
from fptq_compiler.stages.proof import run_proved


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
        run_proved(program, tuple(steps), None, dump_dir)
    return length
