"""untie_weights: a head that shares the embedding's parameter gets a copy of its own."""

from __future__ import annotations

import torch

from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.untie_weights import UntieWeights
from tests.odd_models import shared_blocks
from tests.passes.steps import (
    ONE,
    assert_settled,
    change,
    exported_module,
    pick,
    run,
    with_sites,
)
from tests.toys import ToyConfig, make_tokens

TIED = ToyConfig(layers=1, tied=True)
TABLE = "lm_head.weight"  # the one name that torch.export keeps for a shared parameter

BEFORE = f"""
embedding = embedding(%{TABLE}, input_ids)
linear_7 = linear(rms_norm_default_2, %{TABLE})
"""

AFTER = f"""
embedding = embedding(%{TABLE}, input_ids)
linear_7 = linear(rms_norm_default_2, %{TABLE}_untied)
"""


def test_text() -> None:
    program = with_sites(TIED)
    assert pick(program, "embedding", "linear_7") == BEFORE
    assert run(program, UntieWeights()).changed == 1
    assert pick(program, "embedding", "linear_7") == AFTER
    table, head = program.parameter(TABLE), program.parameter(f"{TABLE}_untied")
    assert torch.equal(table, head)
    assert table.data_ptr() != head.data_ptr()
    site = program.sites.residual
    assert site is not None
    assert (site.tied, site.head.weight, site.readers[-1]) == (
        False,
        f"{TABLE}_untied",
        site.head,
    )


def test_what_it_costs_is_a_decision() -> None:
    program = with_sites(TIED, UntieWeights())
    assert program.decisions == [
        f"untied: linear_7 gets its own copy of {TABLE}, named {TABLE}_untied, 0.0 MB more in "
        "float32 before quantisation"
    ]


def test_numbers() -> None:
    # No tolerance: the copy holds the same numbers.
    assert change(with_sites(TIED), UntieWeights()) == 0


def test_near_miss() -> None:
    """An untied model keeps its parameters."""
    program = with_sites(ONE)
    before = set(dict(program.module.named_parameters()))
    assert run(program, UntieWeights()).changed == 0
    assert set(dict(program.module.named_parameters())) == before
    assert program.decisions == []


def test_twice() -> None:
    assert_settled(with_sites(TIED, UntieWeights()), UntieWeights())


def test_blocks_that_share_weights_and_biases_are_blocks_of_their_own() -> None:
    program = exported_module(shared_blocks(), make_tokens(ToyConfig(), 2, 7), *FIND_SITES)
    assert {site.name for site in program.sites.mlp} == {"model.layers.1.mlp"}
    run(program, UntieWeights())
    names = [site.name for site in (*program.sites.attention, *program.sites.mlp)]
    assert names[:2] == ["model.layers.1.self_attn", "model.layers.1.self_attn_untied"]
    assert len(set(names)) == 4
    refs = [r for s in program.sites.attention for r in (s.q, s.k, s.v, s.o) if r is not None]
    assert len({r.weight for r in refs}) == len({r.bias for r in refs}) == 8
    addresses = {program.parameter(str(r.bias)).data_ptr() for r in refs}
    assert len(addresses) == 8
