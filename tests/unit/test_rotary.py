"""Tables of angles, read off a graph: the closed form of RoPE, whatever its spelling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fptq_compiler.graph import ops
from fptq_compiler.graph.cache_ops import rotate
from fptq_compiler.graph.probe import Probe, Refusal
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.rotary import HeadMap, Rotary, RotaryTables, head_map
from fptq_compiler.graph.sites import RopeLayout
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.unpack_heads import UnpackHeads
from tests import toys
from tests.passes.steps import edited, exported_module, with_sites
from tests.toys import MAX_POSITIONS, ToyConfig, make_tokens

LENGTH = 40
CLOSE = 3e-6
"""Of a cosine: the toy's frequencies are float32, 6e-8 of 1, times positions up to 40; their
table is float32 too. The angle of the next position or pair is 1e-2 off at the least."""
EXACT = 1e-7  # float32 tables against the graph in float64


def read(program: Program, length: int = LENGTH, operand: int = 0
         ) -> tuple[Any, HeadMap | Refusal]:
    """The table of the first attention's queries (0), keys (1) or values (2), and its head map."""
    node = program.call_nodes(ops.attention)[0].args[operand]
    assert isinstance(node, torch.fx.Node)
    probe = Probe(program.module)
    mapped = head_map(probe, node)
    if isinstance(mapped, Refusal):
        return None, mapped
    return RotaryTables(program.module, probe, length).of(mapped, node), mapped


def closed_form(width: int, length: int = LENGTH, theta: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos and sin of p · theta^(-2i / R) in float64."""
    frequencies = theta ** -(torch.arange(0, width, 2).double() / width)
    angles = torch.arange(length).double().outer(frequencies)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("rope", "style", "rotated"),
    [
        ("half", "half-split", 8),
        ("interleaved", "interleaved", 8),
        ("complex", "interleaved", 8),
        ("partial", "half-split", 4),
    ],
)
@pytest.mark.parametrize("operand", [0, 1])
def test_the_table_is_the_closed_form(
    rope: Any, style: str, rotated: int, operand: int
) -> None:
    table, mapped = read(with_sites(ToyConfig(layers=1, rope=rope)), operand=operand)
    assert isinstance(mapped, HeadMap)
    assert (mapped.layout.style, mapped.heads) == (style, (4, 2)[operand])
    assert mapped.layout.passthrough == tuple(range(rotated, 8))
    assert isinstance(table, Rotary)
    assert table.interleaved == (style == "interleaved")
    assert table.cos.dtype == table.sin.dtype == torch.float32
    cos, sin = closed_form(rotated)
    assert table.cos.shape == cos.shape == (LENGTH, rotated // 2)
    assert float((table.cos - cos).abs().max()) < CLOSE
    assert float((table.sin - sin).abs().max()) < CLOSE
    assert table.cos.is_contiguous()


@settings(deadline=None, derandomize=True, max_examples=5)
@given(
    theta=st.floats(50.0, 1e6), head_dim=st.sampled_from((4, 8, 12)), length=st.integers(13, 60)
)
def test_any_base_and_width(theta: float, head_dim: int, length: int) -> None:
    def edit(toy: toys.Toy) -> None:
        rotary: Any = toy.model.rotary_emb
        powers = torch.arange(0, head_dim, 2).double() / head_dim
        rotary.frequencies = (theta**-powers).float()

    config = ToyConfig(layers=1, head_dim=head_dim)
    table, _ = read(edited(config, edit, *FIND_SITES), length)
    cos, sin = closed_form(head_dim, length, theta)
    assert float((table.cos - cos).abs().max()) < CLOSE
    assert float((table.sin - sin).abs().max()) < CLOSE


@pytest.mark.parametrize("rope", ["half", "interleaved", "complex", "partial"])
def test_the_table_rotates_as_the_graph_does(rope: Any) -> None:
    config = ToyConfig(layers=1, rope=rope)
    program = with_sites(config)
    table, mapped = read(program, 13)
    assert isinstance(mapped, HeadMap)
    probe = Probe(program.module)
    node = program.call_nodes(ops.attention)[0].args[0]
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = probe.region.value(node, {mapped.source: x})  # type: ignore[arg-type]
    found = rotate(x.view(2, 13, 4, 8), table.cos[None], table.sin[None], table.interleaved)
    error = (found.transpose(1, 2) - expected).abs().max() / expected.abs().max()
    assert float(error) < 5 * EXACT


def test_a_common_factor_does_not_stand_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """YaRN multiplies its cosines and sines; the attention's scale takes that over."""
    plain = toys.Rotary.forward

    def scaled(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(1.25 * t for t in plain(self, x))

    monkeypatch.setattr(toys.Rotary, "forward", scaled)
    table, mapped = read(edited(ToyConfig(layers=1), lambda _: None, *FIND_SITES))
    assert isinstance(mapped, HeadMap)
    assert mapped.factor == pytest.approx(1.25, rel=1e-6)  # float32
    cos, sin = closed_form(8)
    assert float((table.cos - cos).abs().max()) < CLOSE
    assert float((table.sin - sin).abs().max()) < CLOSE


def test_nothing_turns() -> None:
    for program, operand in ((with_sites(ToyConfig(layers=1)), 2),
                             (with_sites(ToyConfig(layers=1, rope="none")), 0)):
        table, mapped = read(program, operand=operand)
        assert table is None
        assert isinstance(mapped, HeadMap)
        assert mapped.layout == RopeLayout((), tuple(range(8)), 1.0, "none")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            ToyConfig(layers=1, qk_norm=True),
            "the path is not linear (a norm or an activation stands in it)",
        ),
        (
            ToyConfig(layers=1, position_bias=True),
            "something is added that does not come from the projection",
        ),
    ],
    ids=["qk_norm", "position_bias"],
)
def test_head_map_refuses(config: ToyConfig, reason: str) -> None:
    _, mapped = read(with_sites(config))
    assert isinstance(mapped, Refusal)
    assert mapped.reason == reason
    assert mapped.node is not None


def test_heads_that_do_not_lie_side_by_side_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel-major: head h holds every fourth channel from h on, until unpack_heads."""
    plain = toys.rotate
    steps = [step for step in FIND_SITES if not isinstance(step, UnpackHeads)]

    def rotated(x: Tensor, tables: tuple[Tensor, ...], config: ToyConfig) -> Tensor:
        batch, heads, length, width = x.shape
        flat = x.transpose(1, 2).reshape(batch, length, width, heads)
        return plain(flat.permute(0, 3, 1, 2), tables, config)

    monkeypatch.setattr(toys, "rotate", rotated)
    _, mapped = read(edited(ToyConfig(layers=1), lambda _: None, *steps))
    assert isinstance(mapped, Refusal)
    assert mapped.reason == "the heads do not lie side by side before it"


class Stretched(nn.Module):
    """Angles that depend on the length from 16 tokens on, longer than the probe of 13."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = toys.make_toy(ToyConfig(layers=1))

    def forward(self, input_ids: Tensor) -> Tensor:
        decoder: Any = self.toy.model
        x, length = decoder.embed_tokens(input_ids), input_ids.shape[1]
        positions = torch.arange(length)
        beyond = (positions.max() - 15).clamp_min(0).float()
        angles = positions[:, None].float() * decoder.rotary_emb.frequencies / (1 + beyond / 100)
        angles = torch.cat((angles, angles), -1)
        for layer in decoder.layers:
            x = layer(x, (angles.cos(), angles.sin()))
        return self.toy.lm_head(decoder.norm(x))  # type: ignore[no-any-return]


def test_angles_that_change_with_a_length_beyond_the_probe_are_refused() -> None:
    program = exported_module(Stretched(), make_tokens(ToyConfig(), 2, 7), *FIND_SITES)
    table, _ = read(program)
    assert isinstance(table, Refusal)
    assert table.reason.startswith("the angles change with the length of the sequence")
    table, _ = read(program, 16)
    assert isinstance(table, Rotary)  # no sequence gets so long that they would


@pytest.mark.parametrize(
    ("layout", "factor", "reason"),
    [
        (RopeLayout(((0, 7), (1, 6)), (2, 3, 4, 5), 1.0, "other"), 1.0,
         "the rotated pairs ((0, 7), (1, 6))… are neither halves nor neighbours"),
        (RopeLayout(((4, 6), (5, 7)), (0, 1, 2, 3), 1.0, "half-split"), 1.0,
         "the rotated pairs ((4, 6), (5, 7))… are neither halves nor neighbours"),
    ],
    ids=["other", "the last channels turn"],
)
def test_layouts_without_an_operator_are_refused(
    layout: RopeLayout, factor: float, reason: str
) -> None:
    program = with_sites(ToyConfig(layers=1, rope="partial"))
    probe = Probe(program.module)
    node = program.call_nodes(ops.attention)[0].args[0]
    assert isinstance(node, torch.fx.Node)
    mapped = head_map(probe, node)
    assert isinstance(mapped, HeadMap)
    changed = replace(mapped, layout=layout, factor=factor)
    found = RotaryTables(program.module, probe, LENGTH).of(changed, node)
    assert isinstance(found, Refusal)
    assert found.reason == reason


def test_equal_tables() -> None:
    one, _ = read(with_sites(ToyConfig(layers=1)))
    two, _ = read(with_sites(ToyConfig(layers=1)), operand=1)
    assert one.equals(two)
    assert not one.equals(replace(one, interleaved=True))
    assert not one.equals(replace(one, sin=-one.sin))
    assert not one.equals(read(with_sites(ToyConfig(layers=1)), MAX_POSITIONS)[0])
