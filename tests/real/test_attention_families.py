"""The attention of real architectures: what is found, and that T_v and T_k hold there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fptq_compiler.capture import capture
from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import ROUNDING, Verifier
from fptq_compiler.passes import FIND_SITES, insertion
from tests.real.families import VOCABULARY, Family, make_model


@dataclass(frozen=True)
class Expected:
    """An architecture, and its attention's RoPE, key heads, window, cap and refusals."""

    family: Family
    rope: str = "half-split"
    pairs: int = 4
    kv_heads: int = 2
    settings: tuple[float, int] = (0.0, 0)
    masked: bool = False
    refused: tuple[str, ...] = ()


def one(name: str, attention: str = "eager", **settings: Any) -> Family:
    return Family(name, {"num_hidden_layers": 1, **settings}, attention)


FAMILIES = {
    "gemma2": Expected(one("Gemma2", sliding_window=5), settings=(50.0, 5)),
    "mistral-window": Expected(one("Mistral", sliding_window=5), settings=(0.0, 5)),
    "mistral-window-sdpa": Expected(one("Mistral", "sdpa", sliding_window=5), settings=(0.0, 5)),
    "qwen3": Expected(one("Qwen3", "sdpa"), rope="", refused=("prerope",)),
    "olmo2": Expected(one("Olmo2", "sdpa"), rope="", refused=("prerope",)),
    "phi": Expected(one("Phi", "sdpa"), pairs=2),
    "neox": Expected(one("GPTNeoX", rotary_pct=0.5), pairs=2, kv_heads=4),
    "neox-sdpa": Expected(one("GPTNeoX", "sdpa", rotary_pct=0.5), pairs=2, kv_heads=4),
    "gptj": Expected(
        one("GPTJ", n_embd=32, n_head=4, n_layer=1, rotary_dim=4, n_positions=64),
        "interleaved", 2, 4,
    ),
    "opt": Expected(
        one("OPT", "sdpa", ffn_dim=48, word_embed_proj_dim=32), "none", 0, 4
    ),
    "bloom-alibi": Expected(one("Bloom", n_head=4, n_layer=1), "none", 0, 4, masked=True),
    "gpt-bigcode": Expected(
        one("GPTBigCode", n_embd=32, n_head=4, n_layer=1, multi_query=True), "none", 0, 1
    ),
    "cohere": Expected(one("Cohere", "sdpa"), "interleaved"),
    "smollm3-no-rope": Expected(one("SmolLM3", "sdpa", no_rope_layers=[0]), "none", 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_attention(name: str) -> None:
    expected = FAMILIES[name]
    program = unlift(capture(make_model(expected.family)).program)
    verifier = Verifier(program, VOCABULARY, seed=0)

    def observe(step: Pass, result: PassResult) -> None:
        verifier.check(program, step, result)

    run_passes(program, FIND_SITES, observe=observe)
    (site,) = program.sites.attention
    assert (site.heads, site.kv_heads, site.head_dim) == (4, expected.kv_heads, 8)
    assert tuple(site.refused) == expected.refused
    assert (site.rope.style if site.rope else "") == expected.rope
    if site.rope:
        assert len(site.rope.pairs) == expected.pairs
    mask, causal, _, *settings = program.node(site.core).args[3:]
    assert ((mask is not None), causal) == (expected.masked, True)
    assert (tuple(settings) or (0.0, 0)) == expected.settings
    steps = insertion(("value", "prerope"), seed=0, scaling_places=())
    run_passes(program, steps, observe=observe)
    inserted = {n.split(".")[0] for n in program.maps}
    assert inserted == {"value", "prerope"} - set(expected.refused)
    assert max(verifier.errors.values()) <= ROUNDING[torch.float32]  # Gemma's 1 + gain is rounded
