"""Positions besides those of RoPE follow the cache: learned tables, the factor of row 0."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fptq_compiler.errors import UnsupportedModelError, VerificationError
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES, add_cache
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from tests.passes.cached_runs import CACHE, IDS, NO_ROPE, VISIBLE, decoded, empty, step, whole
from tests.passes.learned_positions import Learned, learned
from tests.passes.steps import EXACT, ONE, exported_module, run, span, with_sites
from tests.toys import MAX_POSITIONS, ToyConfig, make_tokens

FIRST = """
positions_default = fptq.positions(attention_mask, input_ids)
eq_scalar = eq.Scalar(positions_default, 0)
to_dtype = to.dtype(eq_scalar, torch.float32)
unsqueeze_default = unsqueeze(to_dtype, -1)
"""


def protected(config: ToyConfig = NO_ROPE) -> Program:
    """Linear inputs in 8 bits; row 0 is a quarter of itself in front of all quantisers."""
    place = PlaceQuantizers(
        weights=16, activations=8, cache=16, block=0, embedding_bits=16, head_bits=16
    )
    program = with_sites(config, place)
    for record in program.activation_quantizers:
        module: Any = program.module.get_submodule(record.module)
        module.set_range(torch.tensor(1 / 64), torch.tensor(128.0))
    program.facts |= {"calibrated", "folded"}
    every = {r.node: 0.25 for r in program.activation_quantizers}
    run_passes(program, (ProtectFirstPosition(every), FreezeQuantizers()))
    return program


def test_the_factor_of_the_first_token_follows_the_cache() -> None:
    """With the quantisers at work, for without them the factor cancels wherever it stands."""
    program = protected()
    expected = whole(program)
    assert run(program, CACHE).changed == 1
    assert span(program, "positions_default", "unsqueeze_default") == FIRST
    for chunk in (1, 4, 11):
        assert relative_error(decoded(program, chunk=chunk), expected) < EXACT
    ids = torch.cat((torch.full((2, 3), 60), IDS), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(IDS)), 1)
    logits, *_ = step(program, ids, mask, empty(program))
    assert relative_error(logits[:, 3:], expected) < EXACT


def test_a_factor_that_stays_with_row_0_of_every_run_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = protected()
    expected = whole(program)
    monkeypatch.setattr(add_cache, "follow_positions", lambda *_: None)
    run(program, CACHE)  # the proof runs without quantisers, where the factor cancels
    assert relative_error(decoded(program), expected) > VISIBLE


@pytest.mark.parametrize("spelling", ["default", "start", "offset", "slice"])
def test_learned_positions_follow_the_cache(spelling: str) -> None:
    program = learned(spelling)
    expected = whole(program)
    run(program, CACHE)
    assert relative_error(decoded(program), expected) < EXACT


class RowOfPositions(Learned):
    """GPT-2's spelling: one row of positions for all of the batch."""

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder = self.toy.model
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        x = decoder.embed_tokens(input_ids) + functional.embedding(positions, self.table)
        for layer in decoder.layers:
            x = layer(x, ())
        return cast(Tensor, self.toy.lm_head(decoder.norm(x)))


def test_one_row_of_positions() -> None:
    program = exported_module(RowOfPositions(), make_tokens(ONE, 2, 7), *FIND_SITES)
    expected = whole(program)
    run(program, AddCache(MAX_POSITIONS))
    assert relative_error(decoded(program), expected) < EXACT


def test_positions_in_a_spelling_that_is_not_followed_fail_the_proof() -> None:
    words = "the logits of the second chunk differ by .*in a way that the rewrite does not follow"
    with pytest.raises(VerificationError, match=words):
        run(learned("indexed"), CACHE)


def test_what_counts_something_else_is_refused() -> None:
    words = "at arange .*it counts something that is not the positions of the input"
    with pytest.raises(UnsupportedModelError, match=words):
        run(learned("count"), CACHE)
