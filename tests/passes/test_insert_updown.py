"""insert_updown (T_u): a positive scale of every channel between up and down projection."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.insert_transforms import InsertUpdown
from tests.passes.steps import EXACT, ONE, assert_settled, change, edited, pick, run, with_sites
from tests.toys import MLP, Toy, ToyConfig

BEFORE = """
linear_4 = linear(rms_norm_default_1, %model.layers.0.mlp.gate_proj.weight)
linear_5 = linear(rms_norm_default_1, %model.layers.0.mlp.up_proj.weight)
linear_6 = linear(mul_5, %model.layers.0.mlp.down_proj.weight)
"""

AFTER = """
linear_4 = linear(rms_norm_default_1, %model.layers.0.mlp.gate_proj.weight)
edges_updown_model_layers_0_mlp_0 = [edges.updown_model_layers_0_mlp.0]\
(%model.layers.0.mlp.up_proj.weight)
linear_5 = linear(rms_norm_default_1, edges_updown_model_layers_0_mlp_0)
edges_updown_model_layers_0_mlp_1 = [edges.updown_model_layers_0_mlp.1]\
(%model.layers.0.mlp.down_proj.weight)
linear_6 = linear(mul_5, edges_updown_model_layers_0_mlp_1)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, "linear_4", "linear_5", "linear_6") == BEFORE
    assert run(program, InsertUpdown()).changed == 1
    edge = "edges_updown_model_layers_0_mlp"
    assert pick(program, "linear_4", f"{edge}_0", "linear_5", f"{edge}_1", "linear_6") == AFTER


def test_numbers() -> None:
    packed = ToyConfig(layers=1, packed_gate_up="slice", mlp_bias=True)
    for config in (ONE, packed):
        assert change(with_sites(config), InsertUpdown()) < EXACT


class Gelu(nn.Module):
    """An MLP without a gate, whose activation passes no scale."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.gelu(self.up_proj(x)))


def test_near_miss() -> None:
    def edit(toy: Toy) -> None:
        toy.model.layers[0].mlp = Gelu(toy.model.layers[0].mlp)

    program = edited(ONE, edit, *FIND_SITES)
    assert run(program, InsertUpdown()).changed == 0
    assert program.maps == {}
    (miss,) = program.near_misses
    assert miss.reason == (
        "no projection whose output channels pass to the down projection by a product"
    )
    assert 'test_insert_updown.py", line' in miss.source


def test_twice() -> None:
    assert_settled(with_sites(ONE, InsertUpdown()), InsertUpdown())
