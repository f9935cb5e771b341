"""The pass protocol: what a pass declares, what it returns, and what is checked around it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fptq_compiler.errors import FptqError, PassError
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.program import NearMiss, Program
from fptq_compiler.graph.surgery import clean

logger = logging.getLogger(__name__)


class Effect(StrEnum):
    """What a pass does to the model's function."""

    PRESERVES = "preserves"
    APPROXIMATES = "approximates"
    ANALYSES = "analyses"


@dataclass(frozen=True)
class PassResult:
    """What a pass did: how many places it changed, and what it almost changed."""

    changed: int = 0
    near_misses: tuple[NearMiss, ...] = field(default=())


class Pass(ABC):
    """One rewrite or analysis. Subclasses are stateless but for their settings.

    Class attributes:
        requires, provides, destroys: facts, as words in `Program.facts`.
        effect: PRESERVES is executed by the verifier, off identity.
        rounds: whether new parameters are stored in the weights' own dtype.
    """

    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    destroys: tuple[str, ...] = ()
    effect: Effect = Effect.PRESERVES
    rounds: bool = False

    @property
    def name(self) -> str:
        """The pass's name: its class, in snake case."""
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__)
        return words.removeprefix("_")

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Rewrite `program` in place."""


Observer = Callable[[Pass, PassResult], None]


def check_order(passes: Sequence[Pass], facts: set[str]) -> None:
    """Raise PassError where a pass requires a fact that nothing before it provides."""
    known = set(facts)
    for step in passes:
        missing = set(step.requires) - known
        if missing:
            message = (
                f"pass {step.name} requires {', '.join(sorted(missing))}, which no pass before "
                f"it provides; known here: {', '.join(sorted(known)) or 'nothing'}"
            )
            raise PassError(message)
        known = (known | set(step.provides)) - set(step.destroys)


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    observe: Observer | None = None,
    dump_dir: Path | None = None,
) -> None:
    """Run the passes in order, each followed by `clean` and `observe` (the verifier's place).

    Raises:
        PassError: an order that cannot hold, or a pass that left a malformed graph; the
            message names the pass and those before it.
    """
    check_order(passes, program.facts)
    done: list[str] = []
    for step in passes:
        logger.info("pass %s", step.name)
        try:
            result = step.run(program)
            clean(program.module)
        except FptqError:
            raise
        except Exception as error:
            message = f"pass {step.name} failed after {', '.join(done) or 'no pass'}: {error}"
            raise PassError(message) from error
        program.facts.update(step.provides)
        program.facts.difference_update(step.destroys)
        program.near_misses.extend(result.near_misses)
        done.append(step.name)
        if dump_dir is not None:
            path = dump_dir / f"{len(done):02d}_{step.name}.txt"
            path.write_text(dump(program.module), encoding="utf-8")
        if observe is not None:
            observe(step, result)
