"""Rounds, samples and their order, by a clock that only the steps move."""

from __future__ import annotations

import pytest

from fptq_compiler.bench.measure import MOST_CALLS, Step, calls_of_a_sample, time_in_turns
from fptq_compiler.progress import SilentProgress


class StubClock:
    """A clock, and steps that take the seconds that they are told, in turn, the last for ever."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def rest(self, seconds: float) -> None:
        self.calls.append("rest")

    def step(self, name: str, *seconds: float) -> Step:
        durations = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return run


class CountingProgress(SilentProgress):
    def __init__(self) -> None:
        self.steps = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.steps += n


@pytest.fixture
def clock() -> StubClock:
    return StubClock()


def test_the_models_take_turns_within_every_round(clock: StubClock) -> None:
    steps = {"A": clock.step("A", 1.0), "B": clock.step("B", 2.0)}
    progress = CountingProgress()
    times = time_in_turns(steps, 3, progress, "decode", clock, clock.rest)
    assert times == {"A": (1.0, 1.0, 1.0), "B": (2.0, 2.0, 2.0)}
    assert clock.calls == ["A", "A", "B", "B", *["rest", "A", "A", "rest", "B", "B"] * 3]
    assert progress.steps == 3


def test_the_warm_up_is_not_among_the_times(clock: StubClock) -> None:
    steps = {"A": clock.step("A", 9.0, 1.0, 8.0, 0.5, 7.0, 0.25)}
    times = time_in_turns(steps, 2, SilentProgress(), "decode", clock, clock.rest)
    assert times == {"A": (0.5, 0.25)}


def test_short_steps_share_a_sample(clock: StubClock) -> None:
    steps = {"A": clock.step("A", 0.03125), "B": clock.step("B", 1.0)}
    times = time_in_turns(steps, 2, SilentProgress(), "decode", clock, clock.rest)
    assert times == {"A": (0.03125, 0.03125), "B": (1.0, 1.0)}
    once = ["rest", "A", "A", "A", "A", "A", "rest", "B", "B"]  # the first of each is not timed
    assert clock.calls == ["A", "A", "B", "B", *once * 2]


@pytest.mark.parametrize(
    ("seconds", "calls"), [(2.0, 1), (0.0625, 2), (0.0, MOST_CALLS), (1e-9, MOST_CALLS)]
)
def test_calls_of_a_sample(clock: StubClock, seconds: float, calls: int) -> None:
    assert calls_of_a_sample(clock.step("A", 5.0, seconds), clock) == calls
