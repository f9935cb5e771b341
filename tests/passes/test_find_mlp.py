"""find_mlp: up is the projection whose scale reaches the down projection, whatever its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.graph.pipeline import Effect, Pass
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.sites import LinearRef, MlpSite
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.find_mlp import FindMlp
from tests.passes.steps import ONE, assert_settled, captured, edited, logits, run
from tests.toys import MLP, Toy, ToyConfig

READY = FIND_SITES[:-2]  # all that stands before find_mlp and find_residual
PATH = "model.layers.0.mlp"

SITE = MlpSite(
    name=PATH,
    up=LinearRef("linear_5", f"{PATH}.up_proj.weight", None, 0, 40, 40),
    gate=LinearRef("linear_4", f"{PATH}.gate_proj.weight", None, 0, 40, 40),
    down=LinearRef("linear_6", f"{PATH}.down_proj.weight", None, 0, 24, 24),
    width=40,
    activation="silu",
)


def test_site() -> None:
    program = captured(ONE, *READY)
    result = run(program, FindMlp())
    assert program.sites.mlp == (SITE,)
    assert result.near_misses == ()


@pytest.mark.parametrize("packing", ["chunk", "slice"])
def test_site_in_packed_weights(packing: str) -> None:
    config = ToyConfig(layers=1, packed_gate_up=packing)  # type: ignore[arg-type]
    (site,) = captured(config, *READY, FindMlp()).sites.mlp
    weight = f"{PATH}.gate_up_proj.weight"
    assert site.gate == LinearRef("linear_4", weight, None, 0, 40, 80)
    assert site.up == LinearRef("linear_4", weight, None, 40, 80, 80)


class Formula(nn.Module):
    """A toy's MLP with another formula between its projections."""

    def __init__(self, mlp: MLP, formula: Callable[[MLP, Tensor], Tensor]) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj
        self.gate_proj, self.formula = mlp.gate_proj, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)  # type: ignore[arg-type]


def _program(formula: Callable[[MLP, Tensor], Tensor], *steps: Pass) -> Program:
    def edit(toy: Toy) -> None:
        layer = toy.model.layers[0]
        layer.mlp = Formula(layer.mlp, formula)

    return edited(ONE, edit, *steps)


def test_site_without_a_gate() -> None:
    """ReLU passes every positive scale: up alone, as in cross-layer equalisation."""
    program = _program(lambda m, x: m.down_proj(functional.relu(m.up_proj(x))), *READY, FindMlp())
    (site,) = program.sites.mlp
    assert site.gate is None
    assert site.up is not None
    assert (site.up.weight, site.activation) == (f"{PATH}.up_proj.weight", "relu")


def test_numbers() -> None:
    """An analysis runs nothing and moves nothing."""
    assert FindMlp.effect is Effect.ANALYSES
    program = captured(ONE, *READY)
    before = logits(program)
    run(program, FindMlp())
    assert logits(program).equal(before)


NO_UP = "no projection whose output channels pass to the down projection by a product"


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (lambda m, x: m.down_proj(functional.gelu(m.up_proj(x))), NO_UP),
        (lambda m, x: m.down_proj(functional.relu(m.up_proj(x)).square()), NO_UP),
        (
            lambda m, x: m.down_proj(functional.silu(m.gate_proj(x)) * m.up_proj(x).clamp(-1, 1)),
            NO_UP,
        ),
        (
            lambda m, x: (
                m.down_proj(functional.silu(m.gate_proj(x)) * (up := m.up_proj(x)))
                + up.mean(-1, keepdim=True)
            ),
            "linear_5 has a second reader, mean",
        ),
    ],
    ids=["gelu", "squared_relu", "clamped", "second_reader"],
)
def test_near_miss(formula: Callable[[MLP, Tensor], Tensor], reason: str) -> None:
    program = _program(formula, *READY)
    result = run(program, FindMlp())
    (site,) = program.sites.mlp
    assert site.refused == {"updown": reason}
    (miss,) = result.near_misses
    assert (miss.what, miss.reason) == ("updown", reason)
    assert 'test_find_mlp.py", line' in miss.source


def test_twice() -> None:
    program = captured(ONE, *READY, FindMlp())
    assert_settled(program, FindMlp())
    assert program.sites.mlp == (SITE,)
