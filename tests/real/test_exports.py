"""Exports of real architectures: the sites that they have, and that all transforms hold there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_compiler.capture import capture
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import Verifier, relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.carry_epsilon import CarryEpsilon
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_online import FreezeOnline
from fptq_compiler.recipe import TRANSFORMS
from fptq_compiler.summary import applied_transforms
from tests.real.families import VOCABULARY, Family, export_plainly, make_model

OFF_IDENTITY = 1e-10  # float64; right maps show 2e-15 here, wrong ones over 1e-4
FOLDED = 1e-5  # of the largest logit, float32 weights; rounding shows 6e-7
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": Family(),
    "llama-eager": Family(attention="eager"),
    "llama-biases": Family(settings=BIASES),
    "llama-mha": Family(settings={"num_key_value_heads": 4}),
    "llama-mqa": Family(settings={"num_key_value_heads": 1}),
    "llama-tied": Family(settings={"tie_word_embeddings": True}),
    "llama-float16": Family(dtype=torch.float16),
    "llama-bfloat16": Family(dtype=torch.bfloat16),
    "llama-eager-bfloat16": Family(attention="eager", dtype=torch.bfloat16),
    "llama-llama3-rope": Family(settings={"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": Family(settings={"rope_parameters": YARN}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "mistral": Family("Mistral"),
    "phi3": Family("Phi3"),
    "gemma": Family("Gemma"),
}
AS_A_USER = ("llama", "llama-eager", "llama-tied", "llama-bfloat16", "mistral", "phi3")


def expected_transforms(name: str) -> dict[str, int]:
    """All six, each at both layers; no T_k where a norm stands on q and k."""
    counts = dict.fromkeys(TRANSFORMS, 2) | {"residual": 1, "scaling": 1}
    if name == "qwen3":
        del counts["prerope"]
    return counts


def check_sites(name: str, program: Program) -> None:
    settings = FAMILIES[name].settings
    sites = program.sites
    assert len(sites.attention) == len(sites.mlp) == 2
    for site in sites.attention:
        shape = (site.heads, site.kv_heads, site.head_dim)
        assert shape == (4, settings.get("num_key_value_heads", 2), 8)
        if name == "qwen3":
            assert site.rope is None
            assert "a norm stands between" in site.refused["prerope"]
        else:
            assert site.rope is not None
            assert site.rope.style == "half-split"
            assert len(site.rope.pairs) == 4
            assert not site.refused
        assert site.v is not None
        assert (site.v.bias is not None) == ("attention_bias" in settings or name == "qwen2")
    for mlp in sites.mlp:
        assert (mlp.width, mlp.refused) == (48, {})
        assert mlp.up is not None
        assert mlp.gate is not None
    assert sites.residual is not None
    assert (sites.residual.width, len(sites.residual.norms)) == (32, 5)
    assert sites.residual.tied == (name in ("llama-tied", "gemma"))  # Gemma ties by default
    missed = [str(m) for m in program.near_misses]
    assert (missed != []) == (name == "qwen3")
    assert all("modeling_qwen3.py" in m for m in missed)


def check_transforms(name: str, program: Program, expected: torch.Tensor, ids: torch.Tensor
                     ) -> None:
    """Find, insert, verify off identity after every pass, fold; then compare in float32."""
    verifier = Verifier(program, VOCABULARY, seed=0)

    def observe(step: object, result: object) -> None:
        verifier.check(program, step, result)  # type: ignore[arg-type]

    run_passes(program, FIND_SITES, observe=observe)
    check_sites(name, program)
    places = ("down_proj", "o_proj")
    run_passes(program, insertion(TRANSFORMS, seed=0, scaling_places=places), observe=observe)
    assert applied_transforms(program) == expected_transforms(name)
    assert max(verifier.errors.values()) <= OFF_IDENTITY
    assert {"insert_value", "insert_residual", "scale_residual"} <= set(verifier.errors)
    run_passes(program, (FoldTransforms(), FreezeOnline(), CarryEpsilon()), observe=observe)
    assert "carry_epsilon" in verifier.errors
    assert relative_error(program.run(ids), expected) <= FOLDED


def token_ids(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 9), generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_transform_holds(name: str, generator: torch.Generator) -> None:
    model, ids = make_model(FAMILIES[name]), token_ids(generator)
    program = unlift(capture(model).program)
    # Half-precision weights are compared in float32, for that is what the compiler widens to.
    expected = model.float()(ids).logits
    check_transforms(name, program, expected, ids)


@pytest.mark.parametrize("name", AS_A_USER)
def test_every_transform_holds_in_an_archive_of_a_plain_export(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    model, ids = make_model(FAMILIES[name]), token_ids(generator)
    path = tmp_path / "model.pt"
    torch.export.save(export_plainly(model), path)
    captured = capture(path)
    assert captured.kind == "archive"
    program = unlift(captured.program)
    assert all(isinstance(size, str) for size in program.inputs[0].dims)
    expected = model.float()(ids).logits
    check_transforms(name, program, expected, ids)


def test_packed_projections_are_ranges_of_one_weight() -> None:
    program = unlift(capture(make_model(FAMILIES["phi3"])).program)
    run_passes(program, FIND_SITES)
    site, mlp = program.sites.attention[0], program.sites.mlp[0]
    ranges = [(r.start, r.stop) for r in (site.q, site.k, site.v) if r is not None]
    assert ranges == [(0, 32), (32, 48), (48, 64)]
    assert mlp.up is not None
    assert mlp.gate is not None
    assert mlp.up.weight == mlp.gate.weight
    assert [(r.start, r.stop) for r in (mlp.gate, mlp.up)] == [(0, 48), (48, 96)]


def test_yarn_scales_what_it_turns() -> None:
    program = unlift(capture(make_model(FAMILIES["llama-yarn"])).program)
    run_passes(program, FIND_SITES)
    rope = program.sites.attention[0].rope
    assert rope is not None
    assert rope.scale == pytest.approx(1.0 + 0.1 * torch.tensor(2.0).log().item(), rel=1e-6)


def test_the_exported_program_is_left_as_it_was(generator: torch.Generator) -> None:
    exported, ids = export_plainly(make_model(FAMILIES["llama-bfloat16"])), token_ids(generator)

    def text() -> str:
        parts = exported.graph_module.modules()
        return "\n".join(str(m.graph) for m in parts if isinstance(m, torch.fx.GraphModule))

    before, expected = text(), exported.module(check_guards=False)(ids)
    program = unlift(exported)
    run_passes(program, FIND_SITES)
    run_passes(program, insertion(TRANSFORMS, seed=0, scaling_places=()))
    run_passes(program, (FoldTransforms(),))
    assert text() == before
    assert torch.equal(exported.module(check_guards=False)(ids), expected)


def test_a_folder_of_a_model_without_a_fused_attention(tmp_path: Path) -> None:
    make_model(Family("Gemma2", attention="eager")).save_pretrained(tmp_path)
    program = unlift(capture(tmp_path).program)
    run_passes(program, FIND_SITES)
    assert len(program.sites.mlp) == len(program.sites.attention) == 2
    assert [program.node(s.core).args[6] for s in program.sites.attention] == [50.0, 50.0]
