"""place_quantizers: fake quantisers where W-A-KV ask for them; 16 means none."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph import evaluate
from fptq_compiler.graph.pipeline import Effect
from fptq_compiler.graph.program import ActivationQuantizer, Program, WeightQuantizer
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.quant.grid import Grid, fake_quantize
from tests.passes.steps import ONE, assert_settled, logits, pick, run, with_sites
from tests.toys import ToyConfig, make_tokens

PATH = "model.layers.0"


def _place(
    weights: int = 4, activations: int = 8, cache: int = 8, block: int = 0,
    embedding_bits: int = 8,
) -> PlaceQuantizers:
    return PlaceQuantizers(
        weights=weights,
        activations=activations,
        cache=cache,
        block=block,
        embedding_bits=embedding_bits,
        head_bits=8,
    )


BEFORE = f"""
linear_4 = linear(rms_norm_default_1, %{PATH}.mlp.gate_proj.weight)
linear_5 = linear(rms_norm_default_1, %{PATH}.mlp.up_proj.weight)
"""

AFTER = f"""
weight_quantizers_model_layers_0_mlp_gate_proj_weight = \
[weight_quantizers.model_layers_0_mlp_gate_proj_weight](%{PATH}.mlp.gate_proj.weight)
activation_quantizers_rms_norm_default_1 = \
[activation_quantizers.rms_norm_default_1](rms_norm_default_1)
linear_4 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_gate_proj_weight)
linear_5 = linear(activation_quantizers_rms_norm_default_1, \
weight_quantizers_model_layers_0_mlp_up_proj_weight)
"""

CORE = """
activation_quantizers_add_1_key = [activation_quantizers.add_1_key](add_1)
activation_quantizers_transpose_2_value = [activation_quantizers.transpose_2_value](transpose_2)
attention_default = fptq.attention(add, activation_quantizers_add_1_key, \
activation_quantizers_transpose_2_value, None, True, 0.3535533905932738)
"""


def test_text() -> None:
    program = with_sites(ONE)
    assert pick(program, "linear_4", "linear_5") == BEFORE
    # Seven linears, head and embedding; five inputs, keys and values.
    assert run(program, _place()).changed == 9 + 7
    assert (
        pick(
            program,
            "weight_quantizers_model_layers_0_mlp_gate_proj_weight",
            "activation_quantizers_rms_norm_default_1",
            "linear_4",
            "linear_5",
        )
        == AFTER
    )
    assert (
        pick(
            program,
            "activation_quantizers_add_1_key",
            "activation_quantizers_transpose_2_value",
            "attention_default",
        )
        == CORE
    )


def test_records() -> None:
    program = with_sites(ONE, _place(activations=4, block=8))
    weights = {q.parameter: q for q in program.weight_quantizers}
    up = f"{PATH}.mlp.up_proj.weight"
    assert weights[up] == WeightQuantizer(
        up, "weight_quantizers.model_layers_0_mlp_up_proj_weight", 4, 8, "linear"
    )
    roles = {q.parameter: (q.bits, q.block, q.role) for q in program.weight_quantizers}
    assert roles["lm_head.weight"] == (8, 0, "head")
    assert roles["model.embed_tokens.weight"] == (8, 0, "embedding")
    inputs = {q.node: q for q in program.activation_quantizers}
    node = "activation_quantizers_rms_norm_default_1"
    assert inputs[node] == ActivationQuantizer(
        "activation_quantizers.rms_norm_default_1",
        node,
        ("linear_4", "linear_5"),
        "linear input",
        4,
    )
    # The head's input has 8 bits at least.
    assert [q.bits for q in program.activation_quantizers if q.role == "head input"] == [8]
    assert [q.role for q in program.activation_quantizers if q.bits == 8] == [
        "head input",
        "key",
        "value",
    ]


def _run_node(program: Program, name: str) -> dict[str, torch.Tensor]:
    """The values of a linear's node and of its input, and its weight's, in a plain run."""
    seen: dict[str, torch.Tensor] = {}
    ids = make_tokens(ONE, 2, 9)

    def watch(node: torch.fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            seen[node.name] = value

    with torch.no_grad():
        evaluate.run(program.module, program.arguments(ids), watch=watch)
    assert name in seen
    return seen


def test_numbers() -> None:
    """The placed linear is the linear of quant.grid's values, bit for bit."""
    program = with_sites(ONE, _place())
    module = program.module
    weights = module.get_submodule("weight_quantizers.model_layers_0_mlp_up_proj_weight")
    inputs = module.get_submodule("activation_quantizers.rms_norm_default_1")
    scale, step, zero = torch.linspace(0.05, 0.2, 40), torch.tensor(0.02), torch.tensor(121.0)
    weights.set_scale(scale)
    inputs.set_range(step, zero)
    seen = _run_node(program, "linear_5")
    x = fake_quantize(seen["rms_norm_default_1"], step, zero, Grid(8, symmetric=False))
    up = program.parameter(f"{PATH}.mlp.up_proj.weight")
    w = fake_quantize(up, scale[:, None], None, Grid(4, symmetric=True))
    # No tolerance: it is the same function on the same numbers.
    assert seen["linear_5"].equal(functional.linear(x, w))
    assert PlaceQuantizers.effect is Effect.APPROXIMATES


@pytest.mark.parametrize(
    ("bits", "expected"),
    [((16, 16, 16), (0, 0)), ((4, 16, 16), (9, 0)), ((16, 8, 16), (0, 5)), ((16, 16, 8), (0, 2))],
    ids=str,
)
def test_near_miss_16_bits_are_none(bits: tuple[int, int, int], expected: tuple[int, int]) -> None:
    program = with_sites(ONE)
    before = logits(program)
    run(program, _place(*bits))
    assert (len(program.weight_quantizers), len(program.activation_quantizers)) == expected
    if bits == (16, 16, 16):
        assert logits(program).equal(before)


def test_near_miss_a_weight_that_is_no_parameter() -> None:
    """A product of two parameters stands there, so there is nothing to store as codes."""
    program = with_sites(ONE)
    up, gate = program.node("linear_5"), program.node("linear_4")
    with program.graph.inserting_before(gate):
        product = program.graph.call_function(
            torch.ops.aten.mul.Tensor, (up.args[1], gate.args[1])
        )
    up.args = (up.args[0], product)
    run(program, _place())
    assert f"{PATH}.mlp.up_proj.weight" not in {q.parameter for q in program.weight_quantizers}


def test_near_miss_rows_of_an_odd_width() -> None:
    """INT4 codes of a table stand two to a byte; INT8 ones do not mind."""
    program = with_sites(ONE)
    (table,) = program.call_nodes(torch.ops.aten.embedding.default)
    table.meta["val"] = table.meta["val"][..., :23]
    message = "embedding: .* rows have 23 values, an odd number; use --embedding-bits 8"
    with pytest.raises(UnsupportedModelError, match=message):
        run(program, _place(embedding_bits=4))
    run(program, _place())


def test_a_shared_weight_is_quantised_once_for_all_readers() -> None:
    program = with_sites(ToyConfig(layers=1, tied=True), _place())
    assert [q.parameter for q in program.weight_quantizers].count("lm_head.weight") == 1
    (table,) = (n for n in program.graph.nodes if n.target == "lm_head.weight")
    (edge,) = table.users
    assert {r.name for r in edge.users} == {"embedding", "linear_7"}


def test_twice() -> None:
    assert_settled(with_sites(ONE, _place()), _place())
