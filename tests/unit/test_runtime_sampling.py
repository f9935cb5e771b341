"""Choosing a token: properties that hold for all logits, and the distribution itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fptq_compiler.errors import RuntimeInputError, VerificationError
from fptq_compiler.runtime.sampling import Sampling, choose, distribution

LOGITS = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, -np.inf]),
).filter(lambda values: bool(np.isfinite(values).any()))
TEMPERATURES = st.floats(0.01, 10)
SEEDS = st.integers(0, 2**32 - 1)


def draw(logits: np.ndarray, sampling: Sampling, seed: int = 0) -> int:
    return choose(logits, sampling, np.random.default_rng(seed))


@given(LOGITS, SEEDS)
def test_temperature_0_takes_the_likeliest(logits: np.ndarray, seed: int) -> None:
    assert draw(logits, Sampling(), seed) == int(logits.argmax())


@given(LOGITS, TEMPERATURES, SEEDS)
def test_top_k_1_takes_the_likeliest(logits: np.ndarray, temperature: float, seed: int) -> None:
    assert draw(logits, Sampling(temperature, top_k=1), seed) == int(logits.argmax())


@given(LOGITS, TEMPERATURES, st.integers(1, 50))
def test_top_k_keeps_k_of_the_likeliest(
    logits: np.ndarray, temperature: float, top_k: int
) -> None:
    found = distribution(logits, Sampling(temperature, top_k))
    kept = found > 0
    assert kept.sum() <= top_k
    if kept.all():
        return
    # What is dropped may have had a probability too small for a float.
    assert logits[kept].min() >= logits[~kept].max()


@given(LOGITS, TEMPERATURES, st.floats(0.001, 0.999))
def test_top_p_keeps_the_smallest_set(
    logits: np.ndarray, temperature: float, top_p: float
) -> None:
    all_tokens = distribution(logits, Sampling(temperature))
    kept = distribution(logits, Sampling(temperature, top_p=top_p)) > 0
    assert all_tokens[kept].sum() >= top_p - 1e-12  # sums in float64 in another order
    without_one = all_tokens[kept].sum() - all_tokens[kept].min()
    assert without_one < top_p + 1e-12
    if not kept.all():
        assert all_tokens[kept].min() >= all_tokens[~kept].max()


@given(LOGITS, TEMPERATURES, st.none() | st.integers(1, 50), st.floats(0.001, 1))
def test_a_distribution_sums_to_1_and_keeps_ratios(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float
) -> None:
    found = distribution(logits, Sampling(temperature, top_k, top_p))
    assert found.sum() == pytest.approx(1, abs=1e-12)
    all_tokens = distribution(logits, Sampling(temperature))
    kept = found > 0
    assert found[kept] == pytest.approx(all_tokens[kept] / all_tokens[kept].sum(), rel=1e-9)


@given(LOGITS, TEMPERATURES, SEEDS)
def test_the_seed_decides(logits: np.ndarray, temperature: float, seed: int) -> None:
    sampling = Sampling(temperature, top_p=0.9)
    assert draw(logits, sampling, seed) == draw(logits, sampling, seed)


def test_draws_follow_the_distribution(seed: int) -> None:
    logits = np.array([2.0, 1.0, 0.0, -np.inf], np.float32)
    sampling = Sampling(temperature=2.0)
    expected = np.exp([1.0, 0.5, 0.0, -np.inf])
    expected /= expected.sum()
    assert distribution(logits, sampling) == pytest.approx(expected, rel=1e-9)
    generator = np.random.default_rng(seed)
    draws = [choose(logits, sampling, generator) for _ in range(4000)]
    counts = np.bincount(draws, minlength=4) / 4000
    # Four standard deviations of a share of 4000 draws are 0.03.
    assert np.abs(counts - expected).max() < 0.04


def test_equal_logits_go_to_the_lower_id() -> None:
    logits = np.array([0.0, 5.0, 5.0, 5.0], np.float32)
    assert draw(logits, Sampling()) == 1
    found = distribution(logits, Sampling(1.0, top_k=2))
    assert found.tolist() == [0.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(value: float, temperature: float) -> None:
    logits = np.array([0.0, value, 1.0], np.float32)
    with pytest.raises(VerificationError, match="highest logit is"):
        draw(logits, Sampling(temperature))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": np.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
