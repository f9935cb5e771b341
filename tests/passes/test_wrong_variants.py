"""Every wrong variant of a transform is caught by the verifier, and the right one beside it not.

The variants are those that fptquant.md and the paper (arXiv 2506.04985) warn of. Each is a pass
that lies: it says that it preserves the function. Off identity the verifier sees that it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.errors import VerificationError
from fptq_compiler.graph import ops
from fptq_compiler.graph.edges import insert_map, insert_online
from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import AttentionSite, LinearRef
from fptq_compiler.graph.verify import TOLERANCE, Verifier
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.fold_norms import FoldNorms
from fptq_compiler.passes.insert_transforms import InsertResidual, out_ports
from fptq_compiler.passes.scale_residual import ScaleResidual
from fptq_compiler.passes.untie_weights import UntieWeights
from fptq_compiler.transforms import Affine, Diagonal, Hadamard, Map, Port, RopePairs, Side
from tests.passes.steps import ONE, captured, edited
from tests.toys import Toy, ToyConfig

aten = torch.ops.aten
VISIBLE = 1e-4
"""Relative: the least that a wrong variant moves the logits; a right one moves them by 1e-13."""

Rewrite = Callable[[Program], None]


class Claimed(Pass):
    """A rewrite that claims to preserve the function."""

    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite = rewrite

    def run(self, program: Program) -> PassResult:
        self.rewrite(program)
        return PassResult(1)


def _verify(program: Program, rewrite: Rewrite, *before: Pass) -> float:
    """Run a rewrite behind `before` under the verifier; return the error that it found."""
    verifier = Verifier(program, ToyConfig.vocabulary, seed=11)
    steps = (*FIND_SITES, *before, Claimed(rewrite))
    run_passes(program, steps, observe=lambda s, r: verifier.check(program, s, r))
    return verifier.errors["claimed"]


def _assert_right(program: Program, rewrite: Rewrite, *before: Pass) -> None:
    assert _verify(program, rewrite, *before) <= TOLERANCE


def _assert_caught(program: Program, rewrite: Rewrite, *before: Pass) -> None:
    with pytest.raises(VerificationError, match="pass claimed changed the model's function") as e:
        _verify(program, rewrite, *before)
    assert float(str(e.value).split("logits ")[1].split(" in ")[0]) > VISIBLE


# T_k: keys T, queries T⁻ᵀ


def _insert_prerope(program: Program, make: Callable[[AttentionSite], Map]) -> None:
    for site in program.sites.attention:
        assert site.q is not None
        assert site.k is not None
        queries = out_ports(site.q, inverse_transpose=True, repeat=site.group)
        insert_map(program, f"prerope.{site.name}", make(site), [*out_ports(site.k), *queries])


def _pairs(site: AttentionSite) -> tuple[Tensor, Tensor, int, int]:
    assert site.rope is not None
    passed = torch.tensor(site.rope.passthrough, dtype=torch.long)
    return torch.tensor(site.rope.pairs), passed, site.kv_heads, site.head_dim


class Reflections(RopePairs):
    """s [[cos φ, sin φ], [sin φ, -cos φ]]: orthogonal too, but it turns RoPE round."""

    def _turn(self, x: Tensor, turn: int, stretch: int) -> tuple[Tensor, Tensor]:
        turned, rest = super()._turn(x, turn, stretch)
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([first, -second], dim=-1), rest


def test_a_reflection_does_not_commute_with_rope() -> None:
    def right(program: Program) -> None:
        _insert_prerope(program, lambda s: RopePairs(*_pairs(s)))

    def wrong(program: Program) -> None:
        _insert_prerope(program, lambda s: Reflections(*_pairs(s)))

    _assert_right(captured(ONE), right)
    _assert_caught(captured(ONE), wrong)


def test_without_rope_a_reflection_is_right() -> None:
    """So it is RoPE that the reflection breaks, and not the test's map."""
    pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])

    def rewrite(program: Program) -> None:
        nothing = torch.empty(0, dtype=torch.long)
        _insert_prerope(program, lambda s: Reflections(pairs, nothing, s.kv_heads, s.head_dim))

    _assert_right(captured(ToyConfig(layers=1, rope="none")), rewrite)


def test_an_untied_scale_inside_a_pair_does_not_commute_with_rope() -> None:
    def wrong(program: Program) -> None:
        _insert_prerope(program, lambda s: Diagonal(s.kv_heads * s.head_dim, s.kv_heads))

    _assert_caught(captured(ONE), wrong)


def test_the_wrong_pair_layout() -> None:
    def insert(program: Program) -> None:
        pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
        _insert_prerope(program, lambda s: RopePairs(pairs, *_pairs(s)[1:]))

    _assert_right(captured(ToyConfig(layers=1, rope="interleaved")), insert)
    _assert_caught(captured(ONE), insert)


def test_t_k_under_qk_norm() -> None:
    """The site has no q and k, so the map is forced in by the parameters' names."""

    def insert(program: Program) -> None:
        (site,) = program.sites.attention
        path = "model.layers.0.self_attn"
        q = LinearRef("linear", f"{path}.q_proj.weight", None, 0, 32, 32)
        k = LinearRef("linear_1", f"{path}.k_proj.weight", None, 0, 16, 16)
        program.sites = replace(program.sites, attention=(replace(site, q=q, k=k),))
        pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
        nothing = torch.empty(0, dtype=torch.long)
        _insert_prerope(program, lambda s: RopePairs(pairs, nothing, s.kv_heads, s.head_dim))

    _assert_right(captured(ONE), insert)
    _assert_caught(captured(ToyConfig(layers=1, qk_norm=True)), insert)


# T_v, T_u, T_d


class Tiled(Map):
    """A map that takes the query heads for groups 0 1 0 1 instead of 0 0 1 1."""

    def __init__(self, inner: Map, repeat: int) -> None:
        super().__init__(inner.size * repeat)
        self.inner = inner

    def _tiles(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, self.inner.size)

    def _multiply(self, x: Tensor) -> Tensor:
        return self.inner.right(self._tiles(x)).reshape(x.shape)

    def _multiply_inverse_transpose(self, x: Tensor) -> Tensor:
        return self.inner.right_inverse_transpose(self._tiles(x)).reshape(x.shape)


def test_t_v_with_the_wrong_group_repeat() -> None:
    def insert(program: Program, *, tiled: bool) -> None:
        (site,) = program.sites.attention
        assert site.v is not None
        assert site.o is not None
        values = Affine(site.kv_heads, site.head_dim)
        insert_map(program, "value", values, out_ports(site.v))
        repeat = 1 if tiled else site.group
        into = Port(site.o.weight, Side.IN, False, repeat)
        outputs = Tiled(values, site.group) if tiled else values
        insert_map(program, "value_out", outputs, [into])

    _assert_right(captured(ONE), lambda p: insert(p, tiled=False))
    _assert_caught(captured(ONE), lambda p: insert(p, tiled=True))


def test_t_u_on_the_gate() -> None:
    def insert(program: Program, *, gate: bool) -> None:
        (site,) = program.sites.mlp
        scaled = site.gate if gate else site.up
        assert scaled is not None
        into = Port(site.down.weight, Side.IN, False)
        insert_map(program, "updown", Diagonal(site.width), [*out_ports(scaled), into])

    _assert_right(captured(ONE), lambda p: insert(p, gate=False))
    _assert_caught(captured(ONE), lambda p: insert(p, gate=True))


def test_t_d_without_its_transpose_in_the_weight() -> None:
    def wrong(program: Program) -> None:
        (site,) = program.sites.mlp
        insert_online(program, "hadamard", Hadamard(site.width), program.node(site.down.node))

    _assert_caught(captured(ONE), wrong)


# T_r


def _insert_residual(program: Program) -> None:
    """InsertResidual without what it requires, and deaf to what the site refuses."""
    site = program.sites.residual
    assert site is not None
    program.sites = replace(program.sites, residual=replace(site, refused={}))
    InsertResidual(1).run(program)


def test_t_r_without_folding_the_gains() -> None:
    _assert_right(captured(ONE), _insert_residual, FoldNorms())
    _assert_caught(captured(ONE), _insert_residual)


def test_t_r_with_a_tied_head() -> None:
    """The last gain is one, so that only the shared parameter can be wrong."""

    def flatten(toy: Toy) -> None:
        toy.model.norm.weight.data.fill_(1.0)

    tied = ToyConfig(layers=1, tied=True)
    _assert_right(edited(tied, flatten), _insert_residual, UntieWeights(), FoldNorms())
    _assert_caught(edited(tied, flatten), _insert_residual, FoldNorms())


# S_n


def _scale(program: Program) -> None:
    assert ScaleResidual().run(program).changed


def _without_scaled_bias(program: Program) -> None:
    """S_n where b is added as it was, and not as S_n b."""
    _scale(program)
    for node in program.call_nodes(aten.mul.Tensor):
        bias = node.args[1]
        if isinstance(bias, Node) and bias.op == "get_attr" and str(bias.target).endswith("bias"):
            node.replace_all_uses_with(bias)


@pytest.mark.parametrize("bias", ["output_bias", "mlp_bias"])
def test_s_n_with_an_unscaled_bias(bias: str) -> None:
    config = ToyConfig(layers=1, **{bias: True})  # type: ignore[arg-type]
    _assert_right(captured(config), _scale, FoldNorms())
    _assert_caught(captured(config), _without_scaled_bias, FoldNorms())


def _with_plain_epsilon(program: Program) -> None:
    """S_n with ε where ε S² belongs."""
    _scale(program)
    for total in program.call_nodes(ops.sum_of_squares):
        (addition,) = total.users
        width = total.args[0].meta["val"].shape[-1]
        addition.args = (total, ONE.epsilon * width)


def test_s_n_with_a_plain_epsilon() -> None:
    """Seen where the embedding is small, for there S_1 = 1 / rms is large and ε S² is not ε."""

    def shrink(toy: Toy) -> None:
        toy.model.embed_tokens.weight.data *= 1e-2
        # A quiet first branch leaves the stream small, as it is in real models' first layers.
        toy.model.layers[0].self_attn.o_proj.weight.data *= 1e-3

    _assert_right(edited(ONE, shrink), _scale, FoldNorms())
    _assert_caught(edited(ONE, shrink), _with_plain_epsilon, FoldNorms())
