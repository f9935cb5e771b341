"""untie_weights: a head that shares the embedding's parameter gets a copy of its own."""

from __future__ import annotations

import torch

from fptq_compiler.passes.untie_weights import UntieWeights
from tests.passes.steps import ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

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
