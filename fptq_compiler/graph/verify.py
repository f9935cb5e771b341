"""Function preservation by running: a reference before any rewrite, and a comparison after each.

Maps are moved off identity for the comparison (at identity every wrong map looks right) and put
back afterwards. The run is in float64, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph import evaluate
from fptq_compiler.graph.pipeline import Effect, Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.transforms.dense import shared_evaluation

TOLERANCE = 1e-9  # relative, float64: a right rewrite shows 1e-15 to 1e-13, a wrong one over 1e-4
# Where a pass stores new parameters, their rounding shows; a wrong rewrite shows far more.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
STRENGTH = 0.3


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@contextmanager
def off_identity(program: Program, seed: int) -> Iterator[None]:
    """All maps randomised inside the context, and as they were after it."""
    generator = torch.Generator().manual_seed(seed)
    saved = {
        name: {k: v.detach().clone() for k, v in transform.state_dict().items()}
        for name, transform in program.maps.items()
    }
    try:
        for transform in program.maps.values():
            transform.randomize_(generator, STRENGTH)
        yield
    finally:
        for name, state in saved.items():
            program.maps[name].load_state_dict(state)


def must_preserve(step: Pass, result: PassResult) -> bool:
    """Whether a pass that ran has anything to prove."""
    return step.effect is Effect.PRESERVES and result.changed > 0


class Verifier:
    """Holds the original's logits on a probe batch, and compares after every pass."""

    def __init__(self, program: Program, vocabulary: int, seed: int, *, tokens: int = 16) -> None:
        """Run the original in float64 on (2, tokens) random ids below `vocabulary`."""
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(vocabulary, (2, tokens), generator=generator)
        self.seed = seed
        self.errors: dict[str, float] = {}
        self.tolerance = TOLERANCE
        dtypes = {p.dtype for p in program.module.parameters() if p.is_floating_point()}
        self.rounding = max(ROUNDING.get(d, 1e-5) for d in dtypes | {torch.float64})
        with torch.no_grad():
            arguments = program.arguments(self.ids)
            self.expected = evaluate.logits(program.module, arguments, torch.float64)
        if not bool(self.expected.isfinite().all()):
            message = (
                "the original model gives logits that are not finite on random token ids; "
                "check the weights (NaN or infinity) before compiling"
            )
            raise VerificationError(message)

    def error(self, program: Program) -> float:
        """The program's relative error against the original, in float64.

        Maps are moved off identity, unless they are folded: what is left online then has its
        inverse in the weights and must stay as it is.
        """
        moved = nullcontext() if "folded" in program.facts else off_identity(program, self.seed)
        with torch.no_grad(), moved, shared_evaluation(program.module, torch.float64):
            arguments = program.arguments(self.ids)
            found = evaluate.logits(program.module, arguments, torch.float64)
        return relative_error(found, self.expected)

    def check(self, program: Program, step: Pass, result: PassResult) -> None:
        """Compare after a pass that preserves the function and changed something.

        Raises:
            VerificationError: the function is not preserved; the message names the pass.
        """
        if must_preserve(step, result):
            self.check_together(program, [step])

    def check_together(self, program: Program, steps: Sequence[Pass]) -> None:
        """Compare once after several passes that all preserve the function; none is no work.

        Raises:
            VerificationError: the function is not preserved; the message names all of them.
        """
        if not steps:
            return
        error = self.error(program)
        self.errors.update((step.name, error) for step in steps)
        rounds = any(step.rounds for step in steps)
        allowed = self.rounding if rounds else self.tolerance
        if not error <= allowed:
            names = ", ".join(step.name for step in steps)
            message = (
                f"pass {names} changed the model's function: relative error of the logits "
                f"{error:.2e} in float64, expected at most {allowed:.0e}. This is a wrong "
                "rewrite; leave the transform out with --transforms and report the model."
            )
            raise VerificationError(message)
        if rounds:  # what was rounded stays, and nothing more may come to it
            self.tolerance = error + TOLERANCE
