"""Passes that run in a stage, and the proof that they preserve the function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import Verifier, must_preserve
from fptq_compiler.memory import return_freed_memory


def run_proved(
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
