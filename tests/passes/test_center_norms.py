"""center_norms: LayerNorms on the stream become RMSNorms of a stream of mean zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.center_norms import CenterNorms
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.untie_weights import UntieWeights
from tests.passes.steps import (
    EXACT,
    ONE,
    assert_settled,
    change,
    edited,
    logits,
    pick,
    run,
    with_sites,
)
from tests.toys import Layer, RMSNorm, Toy, ToyConfig

WIDTH = 24
READY = (*FIND_SITES, UntieWeights())


class Spelled(nn.Module):
    """LayerNorm in operators, without a bias: Cohere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        variance = (wide - wide.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
        wide = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)
        return (self.weight * wide).to(x.dtype)


def _norm(kind: str) -> nn.Module:
    """A norm with gain and bias off 1 and 0."""
    made: nn.Module
    match kind:
        case "spelled":
            made = Spelled()
        case "plain":
            made = nn.LayerNorm(WIDTH, elementwise_affine=False)
        case "no bias":
            made = nn.LayerNorm(WIDTH, bias=False)
        case _:
            made = nn.LayerNorm(WIDTH)
    for name, parameter in made.named_parameters():
        shift = 1.0 if name == "weight" else 0.0
        parameter.data = shift + torch.linspace(-0.5, 0.7, WIDTH)
    return made.requires_grad_(False)


def _model(kind: str, config: ToyConfig = ONE, *, rms: bool = False) -> Program:
    """The toy with LayerNorms; with `rms`, the last one an RMSNorm."""

    def edit(toy: Toy) -> None:
        for module in toy.model.layers:
            assert isinstance(module, Layer)
            module.input_layernorm = _norm(kind)  # type: ignore[assignment]
            module.post_attention_layernorm = _norm(kind)  # type: ignore[assignment]
        if not rms:
            toy.model.norm = _norm(kind)  # type: ignore[assignment]
        else:
            toy.model.norm = RMSNorm(config, WIDTH)
            toy.model.norm.weight.data = torch.linspace(0.5, 1.5, WIDTH)

    return edited(config, edit, *READY)


BEFORE = """
linear_3 = linear(flatten, %model.layers.0.self_attn.o_proj.weight)
layer_norm_1 = layer_norm(add_2, [24], %model.layers.0.post_attention_layernorm.weight, \
%model.layers.0.post_attention_layernorm.bias, 1e-05, False)
linear_4 = linear(layer_norm_1, %model.layers.0.mlp.gate_proj.weight)
"""

AFTER = """
edges_center_model_layers_0_self_attn_o_proj_weight = \
[edges.center.model_layers_0_self_attn_o_proj_weight](%model.layers.0.self_attn.o_proj.weight)
linear_3 = linear(flatten, edges_center_model_layers_0_self_attn_o_proj_weight)
rms_norm_default_1 = fptq.rms_norm(add_2, %model.layers.0.post_attention_layernorm.weight, 1e-05)
edges_shift_layer_norm_1_linear_4 = \
[edges.shift_layer_norm_1.linear_4](%model.layers.0.mlp.gate_proj.bias)
linear_4 = linear(rms_norm_default_1, %model.layers.0.mlp.gate_proj.weight, \
edges_shift_layer_norm_1_linear_4)
"""


def test_text() -> None:
    program = _model("affine")
    assert pick(program, "linear_3", "layer_norm_1", "linear_4") == BEFORE
    assert run(program, CenterNorms()).changed == 3
    names = (
        "edges_center_model_layers_0_self_attn_o_proj_weight", "linear_3", "rms_norm_default_1",
        "edges_shift_layer_norm_1_linear_4", "linear_4",
    )
    assert pick(program, *names) == AFTER
    (mlp,) = program.sites.mlp
    assert mlp.gate is not None
    assert mlp.gate.bias == "model.layers.0.mlp.gate_proj.bias"


@pytest.mark.parametrize("kind", ["affine", "no bias", "plain", "spelled"])
def test_numbers(kind: str) -> None:
    config = ToyConfig(layers=1, mlp_bias=True, attention_bias=True, output_bias=True)
    assert change(_model(kind, config), CenterNorms()) < EXACT


@pytest.mark.parametrize("kind", ["affine", "spelled"])
def test_rotation_and_scale_hold_behind_it(kind: str) -> None:
    program = _model(kind, ToyConfig(layers=1, tied=True))
    expected = logits(program)
    transforms = ("residual", "scaling", "value", "updown")
    for step in insertion(transforms, seed=0, scaling_places=("down_proj", "o_proj")):
        run(program, step)
    assert program.scaled
    assert "residual" in program.maps
    assert relative_error(logits(program), expected) < EXACT


def test_the_stream_has_mean_zero() -> None:
    program = _model("affine")
    run(program, CenterNorms())
    run(program, FoldTransforms())
    table = program.parameter("model.embed_tokens.weight")
    assert float(table.mean(-1).abs().max()) < 1e-7  # float32 rows of order one


def test_near_miss_the_mean_is_read() -> None:
    """An RMSNorm on the same stream sees the mean: nothing may take it out."""
    program = _model("affine", rms=True)
    site = program.sites.residual
    assert site is not None
    reason = "layer_norm is a LayerNorm and rms_norm_default (fptq.rms_norm.default) needs the " \
        "stream's mean"
    assert site.refused == {"residual": reason, "scaling": reason}
    assert run(program, CenterNorms()).changed == 0
    assert {m.what for m in program.near_misses} == {"residual", "scaling"}
    assert all('toys.py", line' in m.source for m in program.near_misses)


def test_a_model_without_layer_norms_stays() -> None:
    assert run(with_sites(ONE, UntieWeights()), CenterNorms()).changed == 0


def test_twice() -> None:
    program = _model("affine")
    run(program, CenterNorms())
    assert_settled(program, CenterNorms())
