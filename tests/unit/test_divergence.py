from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fptq_compiler.optimize import token_parts
from fptq_compiler.optimize.divergence import (
    forward_kl,
    jensen_shannon,
    top1_agreement,
    top_k_kl,
)
from fptq_compiler.optimize.token_parts import TOKENS_AT_ONCE, Logits

FLOAT32 = 5e-7
"""Some roundings of float32, of sums of at most a few terms near 1."""

PROPERTY = settings(deadline=None, derandomize=True)
BOTH = pytest.mark.parametrize("divergence", [forward_kl, jensen_shannon])


def logits(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def reference_kl(student: Tensor, teacher: Tensor) -> float:
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    return float(kl(p, q).mean())


def reference_js(student: Tensor, teacher: Tensor) -> float:
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    middle = (p + q) / 2
    return float((kl(p, middle) + kl(q, middle)).mean() / 2)


pairs = st.tuples(
    st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 40), st.floats(0.01, 30.0)
)


@PROPERTY
@given(pairs)
def test_both_equal_a_reference_in_float64(drawn: tuple[int, int, int, float]) -> None:
    seed, tokens, vocabulary, scale = drawn
    student, teacher = logits(seed, 2, tokens, vocabulary, scale=scale)
    kl_expected = reference_kl(student, teacher)
    # Log-probabilities of up to some 100 nats are rounded to float32.
    assert float(forward_kl(student, teacher)) == pytest.approx(kl_expected, rel=1e-5, abs=1e-6)
    found = float(jensen_shannon(student, teacher))
    assert found == pytest.approx(reference_js(student, teacher), rel=1e-5, abs=FLOAT32)


@PROPERTY
@given(pairs)
def test_jensen_shannon_is_symmetric_and_at_most_ln_2(
    drawn: tuple[int, int, int, float],
) -> None:
    seed, tokens, vocabulary, scale = drawn
    student, teacher = logits(seed, 2, tokens, vocabulary, scale=scale)
    forth, back = jensen_shannon(student, teacher), jensen_shannon(teacher, student)
    assert float(forth) == pytest.approx(float(back), abs=FLOAT32)
    assert -FLOAT32 <= float(forth) <= math.log(2) + FLOAT32


def test_jensen_shannon_reaches_ln_2_where_nothing_is_shared() -> None:
    student, teacher = torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]])
    assert float(jensen_shannon(student, teacher)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(forward_kl(student, teacher)) == pytest.approx(500.0)


@BOTH
def test_equal_distributions_are_at_zero(
    divergence: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    same = logits(seed, 3, 7, 50, scale=5.0)
    assert abs(float(divergence(same, same))) <= FLOAT32
    # A constant added to all logits of a token changes no softmax.
    assert abs(float(divergence(same + 2.0, same))) <= 2 * FLOAT32


@BOTH
def test_parts_give_the_value_and_gradient_of_the_whole(
    divergence: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    tokens = TOKENS_AT_ONCE + 3
    student, teacher = logits(seed, 2, tokens, 20, scale=3.0)
    student.requires_grad_()
    found = divergence(student, teacher)
    single = torch.stack([divergence(q, p) for q, p in zip(student, teacher, strict=True)])
    assert torch.allclose(found, single.mean(), rtol=1e-6, atol=0.0)  # another order of sums
    (gradient,) = torch.autograd.grad(found, student)
    (expected,) = torch.autograd.grad(single.mean(), student)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-9)


@BOTH
def test_the_gradient_is_that_of_finite_differences(
    divergence: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    reference = reference_kl if divergence is forward_kl else reference_js
    student, teacher = logits(seed, 2, 1, 6, scale=2.0)
    (gradient,) = torch.autograd.grad(divergence(student.requires_grad_(), teacher), student)
    exact, step = student.detach().double(), 1e-5
    for index in range(6):
        shift = torch.zeros_like(exact)
        shift[0, index] = step
        slope = (reference(exact + shift, teacher) - reference(exact - shift, teacher)) / 2 / step
        assert float(gradient[0, index]) == pytest.approx(slope, abs=1e-6)


@BOTH
def test_half_precision_is_computed_in_float32(
    divergence: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    student, teacher = logits(seed, 2, 5, 30).bfloat16()
    found = divergence(student, teacher)
    assert found.dtype is torch.float32
    assert torch.equal(found, divergence(student.float(), teacher.float()))


def test_agreement_counts_tokens_with_the_same_maximum() -> None:
    student = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 1.0, 2.0]]])
    teacher = torch.tensor([[[3.0, 1.0, 9.0], [5.0, 6.0, 2.0]]])
    assert float(top1_agreement(student, teacher)) == 0.5
    assert float(top1_agreement(student, student)) == 1.0


@pytest.mark.parametrize("measure", [forward_kl, jensen_shannon, top1_agreement])
def test_other_shapes_are_refused(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="a vocabulary of 3, the teacher one of 4"):
        measure(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"of \(2, 3\) and \(3, 2\) tokens"):
        measure(torch.zeros(2, 3, 5), torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match="expected as many, and some"):
        measure(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize(
    "divergence", [forward_kl, jensen_shannon, partial(top_k_kl, k=5), top1_agreement]
)
@pytest.mark.parametrize("at_once", [60, 1 << 19], ids=["three tokens", "all"])
def test_logits_by_what_they_are_computed_from_give_the_same(
    divergence: Callable[..., Tensor], seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and the gradients to tokens and to a weight that all tokens read."""
    monkeypatch.setattr(token_parts, "VALUES_AT_ONCE", at_once)
    tokens, weight = logits(seed, 2, TOKENS_AT_ONCE, 8), logits(seed + 1, 20, 8)
    teacher = logits(seed + 2, 2, TOKENS_AT_ONCE, 20)
    read = tokens[:, 3:].requires_grad_(), weight.requires_grad_()
    parts = Logits(*read[:1], read[1:], functional.linear)
    found = divergence(parts, Logits(teacher[:, 3:]))
    expected = divergence(functional.linear(*read), teacher[:, 3:])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(parts.whole(), functional.linear(*read))
    if divergence is top1_agreement:
        return
    torch.testing.assert_close(
        torch.autograd.grad(found, read), torch.autograd.grad(expected, read), rtol=1e-4, atol=1e-8
    )


def test_logits_exist_for_a_few_tokens_at_a_time() -> None:
    sizes = []

    def of(tokens: Tensor) -> Tensor:
        sizes.append(len(tokens))
        return tokens.repeat(1, 3)

    tokens = torch.ones(2, TOKENS_AT_ONCE, 4)
    jensen_shannon(Logits(tokens[:, 1:], (), of), Logits(tokens[:, 1:], (), of))
    assert sizes == [TOKENS_AT_ONCE] * 2 + [TOKENS_AT_ONCE - 2] * 2
