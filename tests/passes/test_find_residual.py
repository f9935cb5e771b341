"""find_residual: the stream from the embedding to the head, its norms, writers and readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.find_residual import FindResidual
from tests.passes.steps import EXACT, ONE, assert_settled, captured, edited, logits, run
from tests.toys import MAX_POSITIONS, Layer, RMSNorm, Toy, ToyConfig

READY = FIND_SITES[:-1]


def test_site() -> None:
    program = captured(ONE, *READY)
    result = run(program, FindResidual())
    site = program.sites.residual
    assert site is not None
    assert (site.width, site.tables, site.tied) == (24, ("model.embed_tokens.weight",), False)
    assert site.stream == ("embedding", "add_2", "add_3")
    assert site.norms == ("rms_norm_default", "rms_norm_default_1", "rms_norm_default_2")
    assert [r.node for r in site.readers] == [
        "linear",
        "linear_1",
        "linear_2",  # q, k, v
        "linear_4",
        "linear_5",  # gate, up
        "linear_7",  # head
    ]
    assert [w.weight for w in site.writers] == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    assert [(b.stream, b.norms, b.value, b.add) for b in site.branches] == [
        ("embedding", ("rms_norm_default",), "linear_3", "add_2"),
        ("add_2", ("rms_norm_default_1",), "linear_6", "add_3"),
    ]
    assert site.head.weight == "lm_head.weight"
    assert result.near_misses == ()


def test_site_of_a_tied_model() -> None:
    site = captured(ToyConfig(layers=1, tied=True), *READY, FindResidual()).sites.residual
    assert site is not None
    assert site.tied


def test_numbers() -> None:
    """An analysis runs nothing and moves nothing."""
    assert FindResidual.effect is Effect.ANALYSES
    program = captured(ONE, *READY)
    before = logits(program)
    run(program, FindResidual())
    assert logits(program).equal(before)


class Embedded(nn.Module):
    """The toy's embedding, and something done to it."""

    def __init__(self, table: nn.Embedding, formula: Callable[[Embedded, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.formula = table, formula
        self.places = nn.Embedding(MAX_POSITIONS, table.embedding_dim)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, table.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        return self.formula(self, ids)


def _embedding(formula: Callable[[Embedded, Tensor], Tensor]) -> Callable[[Toy], None]:
    def edit(toy: Toy) -> None:
        toy.model.embed_tokens = Embedded(toy.model.embed_tokens, formula)  # type: ignore[assignment]

    return edit


def test_site_behind_a_scaled_embedding() -> None:
    """Gemma multiplies its embedding by the root of the width: every map commutes with that."""
    edit = _embedding(lambda e, ids: e.table(ids) * 24**0.5)
    site = edited(ONE, edit, *FIND_SITES).sites.residual
    assert site is not None
    assert site.stream[:2] == ("embedding", "mul")


def test_site_with_learned_positions() -> None:
    """Both tables begin the stream, and both turn with it."""
    edit = _embedding(lambda e, ids: e.table(ids) + e.places(torch.arange(ids.shape[1])))
    site = edited(ONE, edit, *FIND_SITES).sites.residual
    assert site is not None
    assert site.tables == (
        "model.embed_tokens.table.weight", "model.embed_tokens.places.weight"
    )
    assert site.refused == {}


def test_site_with_positions_that_padding_hides() -> None:
    """The mask comes from the ids; the table behind it is one of the stream's all the same."""
    edit = _embedding(
        lambda e, ids: e.table(ids) + e.places(ids.cumsum(1) % 8) * (ids != 0).unsqueeze(-1)
    )
    site = edited(ONE, edit, *FIND_SITES).sites.residual
    assert site is not None
    assert len(site.tables) == 2


class Then(nn.Module):
    """A branch, and something done to what it adds."""

    def __init__(self, inner: nn.Module, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.formula = inner, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self.inner(x))


def _branch(formula: Callable[[Tensor], Tensor]) -> Callable[[Toy], None]:
    def edit(toy: Toy) -> None:
        toy.model.layers[0].mlp = Then(toy.model.layers[0].mlp, formula)

    return edit


@pytest.mark.parametrize(
    "formula",
    [lambda y: y * 0.5, lambda y: y.cumsum(1), lambda y: torch.stack((y, y)).mean(0)],
    ids=["multiplier", "sum over tokens", "mean of copies"],
)
def test_a_branch_may_do_what_turns_with_the_channels(
    formula: Callable[[Tensor], Tensor]
) -> None:
    site = edited(ONE, _branch(formula), *FIND_SITES).sites.residual
    assert site is not None
    assert site.refused == {}
    assert site.writers[-1].weight.endswith("down_proj.weight")


class Parallel(nn.Module):
    """Attention and MLP on one norm, added together: GPT-J, Cohere, Falcon."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        y = self.layer.input_layernorm(x)
        added: Tensor = self.layer.self_attn(y, tables) + self.layer.mlp(y)
        return added + x


def _parallel(toy: Toy) -> None:
    toy.model.layers[0] = Parallel(cast(Layer, toy.model.layers[0]))


def test_a_parallel_block_is_one_branch() -> None:
    site = edited(ONE, _parallel, *FIND_SITES).sites.residual
    assert site is not None
    (branch,) = site.branches
    assert (branch.stream, len(branch.norms)) == ("embedding", 1)
    assert len(site.writers) == 2
    assert site.refused == {}


@pytest.mark.parametrize(
    ("edit", "node", "reason"),
    [
        (
            _embedding(lambda e, ids: e.table(ids) * e.gain),
            "mul",
            "mul (aten.mul.Tensor) reads the residual stream",
        ),
        (_branch(torch.tanh), "tanh", "tanh adds to the stream and is not a linear layer"),
        (
            _branch(lambda y: y.roll(1, -1)),
            "roll",
            "roll adds to the stream and is not a linear layer",
        ),
    ],
    ids=["gain", "nonlinearity", "channels moved"],
)
def test_near_miss(edit: Callable[[Toy], None], node: str, reason: str) -> None:
    program = edited(ONE, edit, *READY)
    result = run(program, FindResidual())
    assert program.sites.residual is None
    (miss,) = result.near_misses
    assert (miss.what, miss.node, miss.reason) == ("residual", node, reason)
    assert ", line " in miss.source


class Sandwich(nn.Module):
    """A norm with a gain behind the MLP too: Gemma 2 and 3."""

    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.inner(x))
        return y


def _sandwich(toy: Toy) -> None:
    layer = cast(Layer, toy.model.layers[0])
    norm = RMSNorm(ONE, 24)
    norm.weight.data = torch.linspace(0.5, 1.5, 24)
    layer.mlp = Sandwich(layer.mlp, norm)  # type: ignore[assignment]


def _raw(toy: Toy) -> None:
    toy.model.layers[0].post_attention_layernorm = nn.Identity()


def test_near_miss_of_the_rotation_alone() -> None:
    """A gain behind a writer stops T_r; S_n goes behind it."""
    program = edited(ONE, _sandwich, *FIND_SITES)
    site = program.sites.residual
    assert site is not None
    assert site.refused == {
        "residual": "rms_norm_default_2 stands between a linear layer and the stream, and its "
        "gain stays"
    }
    assert [m.what for m in program.near_misses] == ["residual"]


def test_near_miss_of_the_scale_alone() -> None:
    """A linear on the stream itself turns with it, and would see S_n."""
    site = edited(ONE, _raw, *FIND_SITES).sites.residual
    assert site is not None
    assert site.refused == {"scaling": "linear_4 reads the stream without a norm"}


@pytest.mark.parametrize("edit", [_parallel, _sandwich, _raw, _branch(lambda y: y.cumsum(1))],
                         ids=["parallel", "sandwich", "raw", "sum over tokens"])
def test_what_is_offered_holds(edit: Callable[[Toy], None]) -> None:
    program = edited(ONE, edit, *FIND_SITES)
    expected = logits(program)
    steps = insertion(("residual", "scaling"), seed=0, scaling_places=("down_proj", "o_proj"))
    for step in steps:
        run(program, step)
    site = program.sites.residual
    assert site is not None
    assert program.scaled == ("scaling" not in site.refused)
    assert ("residual" in program.maps) == ("residual" not in site.refused)
    assert relative_error(logits(program), expected) < EXACT


def test_twice() -> None:
    program = captured(ONE, *READY, FindResidual())
    site = program.sites.residual
    assert_settled(program, FindResidual())
    assert program.sites.residual == site
