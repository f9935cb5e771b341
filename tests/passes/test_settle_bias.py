"""settle_bias: after training, biases that followed their weights are parameters."""

from __future__ import annotations

import torch

from fptq_compiler.optimize.mean_shift import mean_shifts
from fptq_compiler.passes.correct_bias import CorrectBias
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from fptq_compiler.passes.settle_bias import SettleBias
from fptq_compiler.passes.track_bias import TrackBias
from tests.passes.steps import assert_settled, pick, run
from tests.passes.test_track_bias import BIASED, IDS, PLAIN, TRAINED, calibrated

BEFORE = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, mean_shifts_linear_3)
"""
AFTER = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, \
%model.layers.0.self_attn.o_proj.weight_bias)
"""
TAKEN = """
linear_3 = linear(activation_quantizers_flatten, \
weight_quantizers_model_layers_0_self_attn_o_proj_weight, \
%model.layers.0.self_attn.o_proj.weight_bias_1)
"""


def test_text() -> None:
    program, means = calibrated(PLAIN)
    run(program, TrackBias(means))
    assert pick(program, "linear_3") == BEFORE
    assert run(program, SettleBias()).changed == 7
    assert pick(program, "linear_3") == AFTER
    assert not [n for n in program.graph.nodes if str(n.target).startswith("mean_shifts")]


def test_numbers() -> None:
    """Settled where it was tracked, off identity, the quantised program is the same."""
    program, means = calibrated(BIASED, (*TRAINED, "hadamard"))
    run(program, TrackBias(means))
    generator = torch.Generator().manual_seed(1)
    for name, transform in program.maps.items():
        if name.partition(".")[0] in TRAINED:
            transform.randomize_(generator, 0.1)
    expected = program.run(IDS)
    run(program, FoldTransforms())
    run(program, SettleBias())
    # Weights are merged in float64 and were in float32: some few lie on a tie between two codes.
    error = (program.run(IDS) - expected).abs()
    assert float(error.median()) < 1e-3 * float(expected.abs().max())


def test_where_nothing_moved_it_is_the_plain_correction() -> None:
    tracked, means = calibrated(BIASED)
    corrected, _ = calibrated(BIASED)
    run(tracked, TrackBias(means))
    run(tracked, SettleBias())
    run(corrected, CorrectBias(mean_shifts(corrected, means)))
    torch.testing.assert_close(tracked.run(IDS), corrected.run(IDS), rtol=0, atol=0)


def test_a_name_that_is_taken_keeps_its_parameter() -> None:
    """A correction on top of a settled bias is a parameter of its own."""
    program, means = calibrated(PLAIN)
    run(program, TrackBias(means))
    run(program, SettleBias())
    settled = "model.layers.0.self_attn.o_proj.weight_bias"
    before = program.parameter(settled).clone()
    run(program, ProtectFirstPosition({"activation_quantizers_flatten": 0.25}))
    run(program, CorrectBias({"linear_3": torch.ones(before.shape[0], dtype=torch.float64)}))
    assert pick(program, "linear_3") == TAKEN
    assert torch.equal(program.parameter(settled), before)


def test_near_miss() -> None:
    """A program whose biases are not tracked stays as it is."""
    program, _ = calibrated(BIASED)
    assert run(program, SettleBias()).changed == 0


def test_run_twice() -> None:
    program, means = calibrated(PLAIN)
    run(program, TrackBias(means))
    run(program, SettleBias())
    assert_settled(program, SettleBias())
