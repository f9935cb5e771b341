"""Blocks written by hand: in whatever spelling, the same sites; broken ones, nothing unsafe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import AttentionSite
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import Verifier
from fptq_compiler.passes import FIND_SITES, insertion
from tests.handwritten import (
    BREAKS,
    CORES,
    HEAD,
    HEADS,
    MASKS,
    MLP,
    PROJECTIONS,
    REPEATS,
    ROPES,
    SCALES,
    VOCABULARY,
    Spelling,
    export_block,
    is_possible,
)
from tests.passes.steps import EXACT, decomposed

TRANSFORMS = ("residual", "value", "prerope", "updown", "hadamard", "scaling")
SPELLINGS = st.builds(
    Spelling,
    projection=st.sampled_from(PROJECTIONS), repeat=st.sampled_from(REPEATS),
    core=st.sampled_from(CORES), mask=st.sampled_from(MASKS), scale=st.sampled_from(SCALES),
    rope=st.sampled_from(ROPES), kv_heads=st.sampled_from((1, 2, HEADS)),
).filter(is_possible)
BROKEN = (
    st.builds(replace, SPELLINGS, broken=st.sampled_from(sorted(BREAKS)))
    .filter(lambda x: x.core != "sdpa" and is_possible(x))
)
PLAIN = Spelling()
EACH = [
    PLAIN,
    *(replace(PLAIN, projection=x, kv_heads=HEADS if x in ("chunk", "unbind") else 2)
      for x in PROJECTIONS[1:]),
    *(replace(PLAIN, repeat=x) for x in REPEATS[1:]),
    *(replace(PLAIN, core=x) for x in CORES[1:]),
    *(replace(PLAIN, mask=x) for x in MASKS if x != PLAIN.mask),
    *(replace(PLAIN, scale=x) for x in SCALES[1:]),
    *(replace(PLAIN, rope=x) for x in ROPES[1:]),
]
MANY = settings(
    max_examples=20, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def name(spelling: Spelling) -> str:
    return "-".join(
        str(value) for field, value in vars(spelling).items() if value != getattr(PLAIN, field)
    ) or "plain"


def transformed(spelling: Spelling, *, core: bool) -> tuple[Program, Verifier]:
    """Find sites and insert all transforms, each pass verified with the maps off identity."""
    exported = export_block(spelling)
    program = unlift(decomposed(exported) if core else exported)
    verifier = Verifier(program, VOCABULARY, seed=3)

    def observe(step: Pass, result: PassResult) -> None:
        verifier.check(program, step, result)

    run_passes(program, FIND_SITES, observe=observe)
    places = ("down", "output")
    run_passes(program, insertion(TRANSFORMS, seed=0, scaling_places=places), observe=observe)
    return program, verifier


def pairs(spelling: Spelling) -> tuple[tuple[int, int], ...]:
    half = spelling.rotary // 2
    if spelling.rope in ("interleaved", "complex"):
        return tuple((2 * i, 2 * i + 1) for i in range(half))
    return tuple((i, i + half) for i in range(half))


def check_site(spelling: Spelling, program: Program, site: AttentionSite) -> None:
    assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, spelling.kv_heads, HEAD)
    assert site.refused == {}
    assert site.rope is not None
    assert site.rope.pairs == pairs(spelling)
    widths = [HEADS * HEAD, *[spelling.kv_heads * HEAD] * 2]
    assert [ref.width for ref in (site.q, site.k, site.v) if ref is not None] == widths
    assert site.o is not None
    in_front = spelling.scale in ("query", "both")  # of RoPE, where it stays
    scale = 1.0 if in_front and spelling.rope != "none" else HEAD**-0.5
    assert program.node(site.core).args[3:] == (None, True, pytest.approx(scale))


def check_spelling(spelling: Spelling, *, core: bool) -> None:
    program, verifier = transformed(spelling, core=core)
    (site,) = program.sites.attention
    check_site(spelling, program, site)
    (mlp,) = program.sites.mlp
    assert (mlp.width, mlp.refused) == (MLP, {})
    assert None not in (mlp.up, mlp.gate)
    assert program.sites.residual is not None
    assert {n.split(".")[0] for n in program.maps} == {*TRANSFORMS} - {"scaling"}
    assert program.scaled
    assert max(verifier.errors.values()) <= EXACT


@pytest.mark.parametrize("spelling", EACH, ids=name)
def test_each_spelling_has_the_same_sites(spelling: Spelling) -> None:
    check_spelling(spelling, core=False)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", EACH, ids=name)
def test_each_spelling_in_core_operators_has_the_same_sites(spelling: Spelling) -> None:
    check_spelling(spelling, core=True)


@pytest.mark.slow
@MANY
@given(spelling=SPELLINGS, core=st.booleans())
def test_any_spelling_has_the_same_sites(spelling: Spelling, core: bool) -> None:
    check_spelling(spelling, core=core)


def check_broken(spelling: Spelling, *, core: bool) -> None:
    """What breaks is not offered, and whatever is offered preserves the function."""
    program, verifier = transformed(spelling, core=core)
    forbidden = BREAKS[spelling.broken]
    assert max(verifier.errors.values(), default=0.0) <= EXACT
    assert not any(n.startswith(f"{forbidden or 'nothing'}.") for n in program.maps)
    if forbidden == "attention":
        assert program.sites.attention == ()
        assert any(m.what == "attention" for m in program.near_misses)
        return
    (site,) = program.sites.attention
    # In a packed projection a break may cost the other transform too; that is no danger.
    assert forbidden in site.refused if forbidden else site.refused == {}
    mask, causal = program.node(site.core).args[3:5]
    assert causal == (spelling.broken != "noncausal")
    assert (mask is not None) == (spelling.broken == "learned_mask")


@pytest.mark.parametrize("broken", BREAKS)
def test_each_break_is_seen(broken: str) -> None:
    check_broken(replace(PLAIN, broken=broken), core=False)


@pytest.mark.slow
@MANY
@given(spelling=BROKEN, core=st.booleans())
def test_nothing_unsafe_is_offered(spelling: Spelling, core: bool) -> None:
    check_broken(spelling, core=core)
