"""What a report shows and a compilation need not know: signal and noise by stage, sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.calibrate import calibrate_activations, calibrate_weights
from fptq_compiler.optimize.sensitivity import block_sensitivity
from fptq_compiler.optimize.signal import Signal, measure_signal
from fptq_compiler.passes import insertion
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report

PLAIN, TRANSFORMED, TRAINED = "plain rounding", "after transforms", "after training"
SEQUENCES, TOKENS = 2, 128
"""Of the calibration tokens, what is measured on."""
WORST = 6
"""Places whose histograms are kept."""


@dataclass(frozen=True)
class Measurements:
    """Fills the measured parts of a report; nothing that is compiled changes.

    It costs a second calibration, a float run of two short sequences a stage, and for the
    sensitivity about half as many runs as there are blocks. While it lasts the weights from
    before the quantisers are kept.

    Attributes:
        original: the model as captured, its sites found.
        transformed: with the transforms, before quantisers were placed; its maps are those of
            the program that is compiled.
        ids: calibration tokens (samples, length).
        recipe: its settings hold for plain rounding too.
        report: gets what is measured, and the stages.
        progress: listens.
    """

    original: Program
    transformed: Program
    ids: Tensor
    recipe: Recipe
    report: Report
    progress: Progress

    def plain(self, placement: PlaceQuantizers) -> None:
        """The original, rounded with searched ranges: no transform, nothing for sinks."""
        with self.report.stage(f"measure {PLAIN}"):
            program = self.original.copy()
            untransformed = insertion((), seed=0, scaling_places=())
            run_passes(program, (*untransformed, FoldTransforms(), placement))
            calibrate_weights(program, self.recipe.weights.p, self.progress)
            calibrate_activations(
                program, [row.unsqueeze(0) for row in self.ids],
                p=self.recipe.activations.p, sinks="none", progress=self.progress,
            )
            found = measure_signal(program, self._measured_ids, program, self.progress)
            tails = {place: spread.kurtosis for place, spread in found.histograms.items()}
            worst = sorted(tails, key=tails.__getitem__, reverse=True)[:WORST]
            self.report.histograms.update((place, {}) for place in worst)
            self._keep(PLAIN, found)

    def signal(self, program: Program, stage: str) -> None:
        """The program that is compiled, as it is at the end of a stage."""
        with self.report.stage(f"measure {stage}"):
            found = measure_signal(
                _folded(program), self._measured_ids, _folded(self.transformed), self.progress
            )
            self._keep(stage, found)

    def sensitivity(self, program: Program) -> None:
        """The program that is compiled, before its quantisers are frozen."""
        with self.report.stage("measure sensitivity"):
            self.report.sensitivity = block_sensitivity(
                _folded(program), self._measured_ids, _folded(self.transformed), self.progress
            )

    @property
    def _measured_ids(self) -> Tensor:
        return self.ids[:SEQUENCES, :TOKENS]

    def _keep(self, stage: str, found: Signal) -> None:
        self.report.sqnr_stages[stage] = found.sqnr
        for place, stages in self.report.histograms.items():
            if place in found.histograms:
                stages[stage] = found.histograms[place]


def _folded(program: Program) -> Program:
    """A copy whose transforms are merged into its weights."""
    copy = program.copy()
    run_passes(copy, (FoldTransforms(),))
    return copy
