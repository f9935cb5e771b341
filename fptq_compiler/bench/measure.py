"""Timing. The models take turns, so that what disturbs the machine disturbs them all.

Milliseconds depend on what else the machine does; the ratio of two times of the same round
depends on it far less, and is what may be quoted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from fptq_compiler.progress import Progress, track

Step = Callable[[], None]
"""One call of a model that returns when its outputs are there."""

Clock = Callable[[], float]

SAMPLE_SECONDS: Final = 0.1
"""Of one timed sample at least: far above the clock's grain."""

REST_SECONDS: Final = 0.2
"""Before a sample: the threads of the model before spin for a while (SmolLM2 in INT4 took
15.6 ms a token at once and 12.9 after a rest)."""

MOST_CALLS: Final = 200
"""Of a step within one sample."""


def time_in_turns(
    steps: Mapping[str, Step],
    repeats: int,
    progress: Progress,
    label: str,
    clock: Clock = time.perf_counter,
    rest: Callable[[float], None] = time.sleep,
) -> dict[str, tuple[float, ...]]:
    """Times every step once a round, after a rest and a call that is not timed.

    Args:
        steps: by the model's label.
        repeats: rounds.
        progress: who listens; one step a round.
        label: what is timed, in words.
        clock: seconds.
        rest: lets so many seconds pass.

    Returns:
        By the model's label, the seconds of one call in each round.
    """
    calls = {name: calls_of_a_sample(step, clock) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(repeats), progress, label, repeats):
        for name, step in steps.items():
            rest(REST_SECONDS)
            step()
            start = clock()
            for _ in range(calls[name]):
                step()
            seconds[name].append((clock() - start) / calls[name])
    return {name: tuple(values) for name, values in seconds.items()}


def calls_of_a_sample(step: Step, clock: Clock) -> int:
    """Warms a step up and says how many calls fill a sample.

    The first call allocates and is not timed; the second one is.
    """
    step()
    start = clock()
    step()
    seconds = clock() - start
    if seconds * MOST_CALLS <= SAMPLE_SECONDS:
        return MOST_CALLS
    return math.ceil(SAMPLE_SECONDS / seconds)
