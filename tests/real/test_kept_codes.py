"""Scales of GPTQ's codes behind the linears of every family: the same function at any scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes.scale_outputs import ScaleOutputs
from fptq_compiler.progress import SilentProgress
from fptq_compiler.quant.modules import WeightFakeQuantizer
from fptq_compiler.recipe import Bits, TrainingRecipe
from fptq_compiler.report import Report
from fptq_compiler.stages import take_in, transform
from fptq_compiler.stages.quantizing import find_ranges
from tests.passes.steps import run
from tests.real.architectures import ARCHITECTURES

TOKENS = [name for name in ARCHITECTURES if name != "ViT"]
"""The families that can be calibrated."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS)
def test_moved_scales_are_the_same_behind_the_linears(
    load_tool: Callable[[str], Any], name: str
) -> None:
    """Activations stay in float: a code of one that is apart would hide what is compared."""
    tool, silent = load_tool("compatibility"), SilentProgress()
    program = take_in(tool.exported(name, ARCHITECTURES[name]))
    recipe = replace(
        tool.QUICK, bits=Bits.parse("4-16-16"), training=TrainingRecipe(steps=1), verify="off"
    )
    ids, report = tool.tokens(), Report(origin=name)
    transform(program, recipe, ids, report, silent)
    find_ranges(program, recipe, ids, report, silent, trained=True)
    as_coded = program.run(ids)
    kept = _move_scales(program.module)
    expected = program.run(ids)
    assert relative_error(as_coded, expected) > 1e-3
    learner = program.copy()
    assert run(learner, ScaleOutputs()).changed >= kept > 0
    assert relative_error(learner.run(ids), expected) < 1e-5  # float32
    assert not any(_keeps_codes(module) for module in _called(learner.module))


def _keeps_codes(module: torch.nn.Module) -> bool:
    return isinstance(module, WeightFakeQuantizer) and module.coded_with is not None


def _called(module: Any) -> list[torch.nn.Module]:
    """The modules that the graph calls."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    return [module.get_submodule(str(node.target)) for node in calls]


def _move_scales(module: Any) -> int:
    """Multiply every scale of kept codes by 1 to 1.2; gives how many quantisers have them."""
    generator = torch.Generator().manual_seed(0)
    found = [quantizer for quantizer in _called(module) if _keeps_codes(quantizer)]
    for quantizer in found:
        assert isinstance(quantizer, WeightFakeQuantizer)
        factors = 1.0 + 0.2 * torch.rand(quantizer.scale.shape, generator=generator)
        quantizer.set_scale(quantizer.scale * factors)
    return len(found)
