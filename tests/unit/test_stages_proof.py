"""Passes are proved together, and a wrong one among them is named."""

from __future__ import annotations

from typing import Any

import pytest

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import TOLERANCE, Verifier
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.insert_transforms import InsertUpdown, InsertValue
from fptq_compiler.passes.untie_weights import UntieWeights
from fptq_compiler.progress import SilentProgress
from fptq_compiler.report import Report
from fptq_compiler.stages import transforming
from fptq_compiler.stages.proof import run_proved
from tests.compiling import quick
from tests.passes.steps import ONE, captured

RECIPE = quick("16-16-16")


class WrongScale(Pass):
    """Doubles the scores of the attention, and says that it preserves the function."""

    def run(self, program: Program) -> PassResult:
        for core in program.call_nodes(ops.attention):
            core.args = (*core.args[:5], 2 * float(str(core.args[5])))
        return PassResult(1)


def transform(monkeypatch: pytest.MonkeyPatch, *steps: Pass) -> tuple[Program, Report, int]:
    """Transform a toy by these passes; gives it, the report, and how often the toy was run."""
    runs = 0
    original = Verifier.error

    def error(self: Verifier, program: Program) -> float:
        nonlocal runs
        runs += 1
        return original(self, program)

    def insertion(*_: Any, **__: Any) -> tuple[Pass, ...]:
        return steps

    monkeypatch.setattr(Verifier, "error", error)
    monkeypatch.setattr(transforming, "insertion", insertion)
    monkeypatch.setattr(transforming, "_refuse_missing", lambda *_: None)
    program, report = captured(ONE), Report("toy")
    transforming.transform(program, RECIPE, None, report, SilentProgress())
    return program, report, runs


def test_passes_between_two_that_round_are_proved_by_one_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, report, runs = transform(
        monkeypatch, UntieWeights(), FoldNorms(), InsertValue(0), InsertUpdown()
    )
    together = {report.preserved[n] for n in ("fold_norms", "insert_value", "insert_updown")}
    assert len(together) == 1
    assert together.pop() <= TOLERANCE
    assert {"fold_constants", "fold_transforms"} < set(report.preserved)
    assert runs == 5  # canonicalize; fold_constants; what is raised; what is inserted; the fold


def test_a_wrong_pass_among_right_ones_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "pass wrong_scale changed the model's function"
    with pytest.raises(VerificationError, match=words):
        transform(monkeypatch, UntieWeights(), FoldNorms(), WrongScale(), InsertValue(0))


def test_a_copied_program_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured(ONE)
    nodes = [n.name for n in program.copy().graph.nodes]
    copied = program.copy()
    run_proved(copied, FIND_SITES, None, None)
    assert copied.sites.attention
    assert not program.sites.attention
    assert [n.name for n in program.graph.nodes] == nodes
    assert not program.facts
