"""Learning rates: a linear rise, half a cosine, and never zero."""

import pytest

from fptq_compiler.optimize.schedule import FLOOR, rate_factor


def test_rates_rise_linearly_and_then_fall() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:9] == pytest.approx([step / 10 for step in range(1, 10)])
    assert factors[9] == 1.0
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[54] == pytest.approx((1 + FLOOR) / 2)  # half way down
    assert factors[-1] == pytest.approx(FLOOR)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_short_training_has_rates_too(steps: int, warmup: float) -> None:
    factors = [rate_factor(step, steps, warmup) for step in range(steps)]
    assert all(FLOOR <= factor <= 1.0 for factor in factors)


def test_without_a_warm_up_the_first_step_is_almost_whole() -> None:
    assert 0.99 < rate_factor(0, 100, 0.0) < 1.0
