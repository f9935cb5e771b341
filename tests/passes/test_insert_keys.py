"""insert_keys (QuaRot): a Hadamard of queries and keys behind RoPE, in no weight."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph.edges import insert_online
from fptq_compiler.graph.pipeline import Pass, PassResult
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import Verifier
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.passes.insert_keys import InsertKeys
from fptq_compiler.transforms import Hadamard
from tests.passes.steps import EXACT, ONE, assert_settled, change, pick, run, with_sites
from tests.toys import ToyConfig

NAME = "keys_model_layers_0_self_attn"
CORE = "attention_default"
ONLINE = (InsertKeys(), FoldTransforms(), FreezeOnline())

BEFORE = """
attention_default = fptq.attention(add, add_1, transpose_2, None, True, 0.3535533905932738)
"""

AFTER = """
online_keys_model_layers_0_self_attn_query = [online.keys_model_layers_0_self_attn_query](add)
online_keys_model_layers_0_self_attn_key = [online.keys_model_layers_0_self_attn_key](add_1)
attention_default = fptq.attention(online_keys_model_layers_0_self_attn_query, \
online_keys_model_layers_0_self_attn_key, transpose_2, None, True, 0.3535533905932738)
"""

FROZEN = """
mix = mix(add, None, %online.hadamard_8)
mix_1 = mix(add_1, None, %online.hadamard_8)
attention_default = fptq.attention(mix, mix_1, transpose_2, None, True, 0.3535533905932738)
"""

CACHED = """
split_heads = split_heads(linear, 4)
rotate_at = rotate_at(split_heads, %rotary.0.cos, %rotary.0.sin, positions_default, False)
mix_2 = mix(rotate_at, None, %online.hadamard_8)
flatten_using_ints = flatten.using_ints(mix_2, 2)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, CORE) == BEFORE
    assert run(program, InsertKeys()).changed == 1
    assert pick(program, f"online_{NAME}_query", f"online_{NAME}_key", CORE) == AFTER


def test_frozen_they_share_one_factor() -> None:
    program = with_sites(ONE, InsertKeys(), FoldTransforms())
    assert change(program, FreezeOnline()) < 1e-6  # a factor of order 8 is rounded to 6e-8
    assert pick(program, "mix", "mix_1", CORE) == FROZEN


@pytest.mark.parametrize(
    "config",
    [ONE, ToyConfig(layers=1, head_dim=12), ToyConfig(layers=1, rope="partial", kv_heads=1),
     ToyConfig(layers=1, qk_norm=True)],
)
def test_numbers(config: ToyConfig) -> None:
    """Order 12 is one factor; 24 would be two, whose order of channels both sides share."""
    assert change(with_sites(config), InsertKeys()) < EXACT


def test_both_sides_have_one_order_of_channels() -> None:
    config = ToyConfig(layers=1, head_dim=40)  # 20 x 2
    program = with_sites(config, InsertKeys(), FoldTransforms())
    assert change(program, FreezeOnline()) < 1e-6
    mixed = pick(program, "mix")
    assert mixed == "\nmix = mix(add, None, %online.hadamard_20, %online.hadamard_2)\n"


def test_a_cache_holds_what_was_mapped() -> None:
    """Proved by running inside the pass; RoPE stands in front of the map and not behind."""
    program = with_sites(ONE, *ONLINE)
    assert run(program, AddCache(40)).changed == 1
    assert pick(program, "split_heads", "rotate_at", "mix_2", "flatten_using_ints") == CACHED


@pytest.mark.parametrize("config", [ToyConfig(rope="interleaved"), ToyConfig(rope="none")])
def test_a_cache_follows_the_map(config: ToyConfig) -> None:
    assert run(with_sites(config, *ONLINE), AddCache(40)).changed == 2


class _KeysAlone(Pass):
    """The wrong variant: queries are not mapped."""

    def run(self, program: Program) -> PassResult:
        (site,) = program.sites.attention
        transform = program.maps.setdefault("keys.wrong", Hadamard(site.head_dim))
        insert_online(program, "keys", transform, program.node(site.core), position=1)
        return PassResult(1)


def test_the_verifier_sees_keys_that_are_mapped_alone() -> None:
    program = with_sites(ONE)
    verifier, step = Verifier(program, ToyConfig.vocabulary, seed=1), _KeysAlone()
    result = run(program, step)
    with pytest.raises(VerificationError, match="keys_alone changed the model's function"):
        verifier.check(program, step, result)


def test_near_miss() -> None:
    """A site that refuses stays, and the one beside it does not."""
    program = with_sites(ToyConfig())
    first, second = program.sites.attention
    program.sites = replace(
        program.sites, attention=(replace(first, refused={"keys": "not wanted here"}), second)
    )
    assert run(program, InsertKeys()).changed == 1
    assert list(program.maps) == ["keys.model.layers.1.self_attn"]
    assert pick(program, CORE) == BEFORE


def test_twice() -> None:
    assert_settled(with_sites(ONE, InsertKeys()), InsertKeys())
