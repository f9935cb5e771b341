"""freeze_quantizers: what was fake becomes integer codes and literals."""

from __future__ import annotations

import pytest
import torch

from fptq_compiler.errors import PassError
from fptq_compiler.graph import ops
from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.graph.program import Program
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.freeze_quantizers import FreezeQuantizers
from fptq_compiler.passes.insert_transforms import InsertHadamard
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.quant.grid import Grid, fake_quantize, quantize
from fptq_compiler.quant.modules import ActivationFakeQuantizer, WeightFakeQuantizer
from fptq_compiler.quant.pairs import unpack_pairs
from tests.passes.steps import assert_settled, pick, run, with_sites
from tests.toys import ToyConfig, make_tokens

CONFIG = ToyConfig(layers=1, mlp_bias=True)
UP = "model.layers.0.mlp.up_proj.weight"
TABLE = "model.embed_tokens.weight"

BEFORE = f"""
weight_quantizers_model_embed_tokens_weight = \
[weight_quantizers.model_embed_tokens_weight](%{TABLE})
embedding = embedding(weight_quantizers_model_embed_tokens_weight, input_ids)
activation_quantizers_rms_norm_default_1 = \
[activation_quantizers.rms_norm_default_1](rms_norm_default_1)
weight_quantizers_model_layers_0_mlp_up_proj_weight = \
[weight_quantizers.model_layers_0_mlp_up_proj_weight](%{UP})
linear_5 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_up_proj_weight, %model.layers.0.mlp.up_proj.bias)
"""

AFTER = f"""
embedding_default = fptq.embedding(input_ids, %{TABLE}_codes, %{TABLE}_scale, 8)
activation_quantizers_rms_norm_default_1_frozen = \
fptq.fake_quantize(rms_norm_default_1, 0.03125, 121, 8, 'linear input')
linear_5_frozen = fptq.linear(activation_quantizers_rms_norm_default_1_frozen, %{UP}_codes, \
%{UP}_scale, %model.layers.0.mlp.up_proj.bias, 4, 0)
"""


def _calibrated(block: int = 0, embedding_bits: int = 8) -> Program:
    """Quantisers with ranges that fit: weights by their largest, activations over (-3.8, 4.2)."""
    place = PlaceQuantizers(
        weights=4, activations=8, cache=8, block=block, embedding_bits=embedding_bits,
        head_bits=8,
    )
    program = with_sites(CONFIG, InsertHadamard(), FoldTransforms(), place)
    for record in program.weight_quantizers:
        module = program.module.get_submodule(record.module)
        assert isinstance(module, WeightFakeQuantizer)
        rows = program.parameter(record.parameter).abs().amax(1)
        scale = (rows / module.grid.highest).reshape(-1, *[1] * (module.scale.dim() - 1))
        module.set_scale(scale.expand_as(module.scale))
    for activation in program.activation_quantizers:
        found = program.module.get_submodule(activation.module)
        assert isinstance(found, ActivationFakeQuantizer)
        found.set_range(torch.tensor(2.0**-5), torch.tensor(120.75))
    program.facts.add("calibrated")
    return program


def test_text() -> None:
    program = _calibrated()
    assert (
        pick(
            program,
            "weight_quantizers_model_embed_tokens_weight",
            "embedding",
            "activation_quantizers_rms_norm_default_1",
            "weight_quantizers_model_layers_0_mlp_up_proj_weight",
            "linear_5",
        )
        == BEFORE
    )
    # Seven linears, head and embedding; five inputs, keys and values.
    assert run(program, FreezeQuantizers()).changed == 9 + 7
    assert (
        pick(
            program,
            "embedding_default",
            "activation_quantizers_rms_norm_default_1_frozen",
            "linear_5_frozen",
        )
        == AFTER
    )
    assert UP not in dict(program.module.named_parameters())


@pytest.mark.parametrize("block", [0, 8], ids=["per_channel", "per_block"])
def test_codes(block: int) -> None:
    """The codes are quant.grid's, inputs first for a linear, rows first for an embedding."""
    program = _calibrated(block)
    up, table = program.parameter(UP), program.parameter(TABLE)
    run(program, FreezeQuantizers())
    scale = program.parameter(f"{UP}_scale")
    assert scale.shape == ((40,) if block == 0 else (3, 40))
    expanded = scale if block == 0 else scale.repeat_interleave(block, 0)
    expected = quantize(up.t(), expanded, None, Grid(4, symmetric=True))
    codes = program.parameter(f"{UP}_codes")
    assert (codes.dtype, codes.shape) == (torch.int8, (24, 40))
    assert codes.equal(expected.to(torch.int8))
    rows = program.parameter(f"{TABLE}_scale")[:, None]
    expected = quantize(table, rows, None, Grid(8, symmetric=True))
    assert program.parameter(f"{TABLE}_codes").equal(expected.to(torch.int8))


def test_codes_of_an_embedding_in_four_bits() -> None:
    """Two to a byte, and a row gathered and taken apart is the fake-quantised row, bit for bit."""
    program = _calibrated(embedding_bits=4)
    table, ids = program.parameter(TABLE), make_tokens(CONFIG, 2, 11)
    run(program, FreezeQuantizers())
    packed, scale = program.parameter(f"{TABLE}_codes"), program.parameter(f"{TABLE}_scale")
    assert (packed.dtype, packed.shape) == (torch.uint8, (61, 12))
    expected = quantize(table, scale[:, None], None, Grid(4, symmetric=True))
    assert unpack_pairs(packed).equal(expected.to(torch.int8))
    rows = ops.embedding(ids, packed, scale, 4)
    assert rows.equal(fake_quantize(table, scale[:, None], None, Grid(4, symmetric=True))[ids])


@pytest.mark.parametrize("block", [0, 8], ids=["per_channel", "per_block"])
def test_numbers(block: int) -> None:
    """The frozen program is the fake-quantised one."""
    program = _calibrated(block)
    ids = make_tokens(CONFIG, 2, 11)
    before = program.run(ids)
    run(program, FreezeQuantizers())
    # The weights' values are the same bits; a matmul on (K, N) may sum in another order, which
    # moves an activation code by one in rare ties: none here, so only rounding is left.
    torch.testing.assert_close(program.run(ids), before, rtol=0, atol=1e-5)
    assert FreezeQuantizers.effect is Effect.APPROXIMATES


STORED = """
activation_quantizers_add_1_key_frozen = fptq.stored(add_1, \
%activation_quantizers.add_1_key_scale, 4)
activation_quantizers_transpose_2_value_frozen = fptq.stored(transpose_2, \
%activation_quantizers.transpose_2_value_scale, 4)
"""


@pytest.mark.parametrize("channels", [False, True], ids=["per_tensor", "per_channel"])
def test_what_a_cache_will_store(channels: bool) -> None:
    """The frozen values are the fake-quantised ones, bit for bit."""
    place = PlaceQuantizers(
        weights=16, activations=16, cache=4, block=0, embedding_bits=16, head_bits=16,
        stored_cache=True, channel_scales=channels,
    )
    program = with_sites(ToyConfig(layers=1), place)
    shape = (1, 2, 1, 8) if channels else (1, 1, 1, 1)
    scale = torch.linspace(0.1, 0.9, 16 if channels else 1).reshape(shape)
    for record in program.activation_quantizers:
        module = program.module.get_submodule(record.module)
        assert isinstance(module, ActivationFakeQuantizer)
        module.set_range(scale.view_as(module.scale), torch.tensor(0.0))
    program.facts |= {"calibrated", "folded"}
    ids = make_tokens(CONFIG, 2, 11)
    before = program.run(ids)
    assert run(program, FreezeQuantizers()).changed == 2
    names = [f"{q.node}_frozen" for q in program.activation_quantizers]
    assert pick(program, *names) == STORED
    for record in program.activation_quantizers:
        assert program.parameter(f"{record.module}_scale").equal(scale)
    assert program.run(ids).equal(before)


def test_near_miss() -> None:
    """Without ranges there is nothing to freeze: the pipeline names the missing fact."""
    program = _calibrated()
    program.facts.remove("calibrated")
    with pytest.raises(PassError, match="pass freeze_quantizers requires calibrated, which no"):
        run(program, FreezeQuantizers())


def test_twice() -> None:
    program = _calibrated()
    run(program, FreezeQuantizers())
    assert_settled(program, FreezeQuantizers())
