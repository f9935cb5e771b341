"""Every spelling of the toy, through site finding, every transform and the fold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import RopeLayout
from fptq_compiler.graph.verify import ROUNDING, Verifier
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.fold_transforms import FoldTransforms
from tests.passes.steps import EXACT, captured
from tests.toys import SPELLINGS, ToyConfig, name_spelling

TRANSFORMS = ("residual", "value", "prerope", "updown", "hadamard", "scaling")
PLACES = ("down_proj", "o_proj")

# One block says all about a spelling; how blocks follow each other is the default's to say.
CONFIGS = (ToyConfig(), *(replace(c, layers=1) for c in SPELLINGS))
every_spelling = pytest.mark.parametrize("config", CONFIGS, ids=name_spelling)


def _tolerance(config: ToyConfig) -> float:
    """1e-10, but for 1 + gain, which a pass stores rounded to float32."""
    if config.norm == "one_plus":
        return ROUNDING[torch.float32]
    return EXACT


def _refused(config: ToyConfig) -> dict[str, str]:
    """The transforms that a spelling does not allow, each with the start of its reason."""
    refused = {}
    if config.qk_norm:
        refused["prerope"] = "query: a norm stands between the projection and attention"
    if config.position_bias:
        refused["prerope"] = "query: something is added that does not come from the projection"
    if config.value_readers == 2:
        refused["value"] = "v has a second reader"
        refused["residual"] = "add_2 adds to the stream and is not a linear layer"
    return refused


def _rope(config: ToyConfig) -> RopeLayout | None:
    """What RoPE does to a head, from the configuration alone."""
    if "prerope" in _refused(config):
        return None
    half, width = config.rotary_dim // 2, config.rotary_dim
    passed = tuple(range(width, config.head_dim))
    match config.rope:
        case "none":
            return RopeLayout((), passed, 1.0, "none")
        case "half" | "partial":
            return RopeLayout(tuple((i, i + half) for i in range(half)), passed, 1.0, "half-split")
        case _:
            pairs = tuple((i, i + 1) for i in range(0, width, 2))
            return RopeLayout(pairs, passed, 1.0, "interleaved")


@every_spelling
def test_sites(config: ToyConfig) -> None:
    program = captured(config, *FIND_SITES)
    refused = _refused(config)
    sites = program.sites
    assert len(sites.attention) == len(sites.mlp) == config.layers
    for attention in sites.attention:
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (
            config.heads,
            config.kv_heads,
            config.head_dim,
        )
        assert attention.rope == _rope(config)
        assert None not in (attention.v, attention.o)
        assert set(attention.refused) == set(refused) - {"residual"}
        for name, reason in attention.refused.items():
            assert reason.startswith(refused[name])
    for mlp in sites.mlp:
        assert mlp.refused == {}
        assert mlp.up is not None
        assert mlp.gate is not None
        assert (mlp.up.width, mlp.gate.width) == (config.mlp, config.mlp)
        assert "up" in mlp.up.weight
        assert mlp.up.start == (0 if config.packed_gate_up == "none" else config.mlp)
    assert (sites.residual is None) == ("residual" in refused)
    if sites.residual is not None:
        assert len(sites.residual.norms) == 2 * config.layers + 1
        assert sites.residual.tied == config.tied
    # What was refused is reported with the user's line, and nothing else is.
    assert {m.what for m in program.near_misses} == set(refused)
    assert all('toys.py", line' in m.source for m in program.near_misses)


def _inserted(config: ToyConfig, verifier: Verifier, *names: str) -> tuple[Program, list[str]]:
    """Insert the named transforms, verifying each pass; also give the passes that did a thing."""
    program = captured(config)
    done: list[str] = []

    def observe(step: Pass, result: PassResult) -> None:
        verifier.check(program, step, result)
        if result.changed:
            done.append(step.name)

    steps = (*FIND_SITES, *insertion(names, seed=3, scaling_places=PLACES))
    run_passes(program, steps, observe=observe)
    return program, done


def _expected(config: ToyConfig, name: str) -> bool:
    refused = _refused(config)
    return name not in refused and not (name == "scaling" and "residual" in refused)


@pytest.mark.slow
@every_spelling
def test_each_transform_alone(config: ToyConfig) -> None:
    verifier = Verifier(captured(config), config.vocabulary, seed=7)
    for name in TRANSFORMS:
        program, done = _inserted(config, verifier, name)
        expected = "scale_residual" if name == "scaling" else f"insert_{name}"
        assert (expected in done) == _expected(config, name), name
        assert verifier.error(program) <= _tolerance(config), name


@every_spelling
def test_all_together_then_folded(config: ToyConfig) -> None:
    verifier = Verifier(captured(config), config.vocabulary, seed=7)
    program, _ = _inserted(config, verifier, *TRANSFORMS)
    assert verifier.error(program) <= _tolerance(config)
    inserted = {name.split(".")[0] for name in program.maps}
    assert inserted == {n for n in TRANSFORMS if _expected(config, n)} - {"scaling"}
    assert program.scaled == _expected(config, "scaling")
    generator = torch.Generator().manual_seed(7)
    for transform in program.maps.values():
        transform.randomize_(generator, 0.3)
    run_passes(program, (FoldTransforms(),))
    # Every weight is rounded once to float32 (6e-8); a float64 model only to 1e-16.
    folded = EXACT if config.dtype == torch.float64 else ROUNDING[torch.float32]
    assert verifier.error(program) <= folded
