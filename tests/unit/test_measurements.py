"""What a report measures: signal and noise by place, sensitivity by block, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.blocks import Block, outline
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.surgery import set_parameter
from fptq_compiler.optimize.bypass import Bypass
from fptq_compiler.optimize.calibrate import calibrate_activations, calibrate_weights
from fptq_compiler.optimize.divergence import jensen_shannon
from fptq_compiler.optimize.mean_shift import mean_shifts
from fptq_compiler.optimize.sensitivity import block_sensitivity
from fptq_compiler.optimize.signal import BINS, histogram, measure_signal
from fptq_compiler.passes import insertion
from fptq_compiler.passes.correct_bias import CorrectBias
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from fptq_compiler.passes.protect_first_position import ProtectFirstPosition
from fptq_compiler.passes.settle_bias import SettleBias
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.stages.quantizing import find_ranges
from tests.passes.steps import SEED, run, with_sites
from tests.shop import Shop
from tests.toys import ToyConfig

SILENT = SilentProgress()
IDS = torch.arange(40).reshape(2, 20)
ROUNDING = 1e-5  # relative, of float32 sums in another order


@pytest.fixture(scope="module")
def programs() -> tuple[Program, Program]:
    """A biased toy at 4-8-8 with corrected biases and a sink, and the same without quantisers."""
    config = ToyConfig(attention_bias=True, mlp_bias=True)
    program = with_sites(config, *insertion((), seed=SEED, scaling_places=()), FoldTransforms())
    plain = program.copy()
    run(program, PlaceQuantizers(
        weights=4, activations=8, cache=8, block=0, embedding_bits=8, head_bits=8
    ))
    calibrate_weights(program, 2.0, SILENT)
    found = calibrate_activations(program, [IDS], p=2.0, sinks="none", progress=SILENT)
    run(program, CorrectBias(mean_shifts(program, found.means)))
    sink = next(q.node for q in program.activation_quantizers if q.role == "linear input")
    run(program, ProtectFirstPosition({sink: 0.5}))
    return program, plain


@torch.no_grad()
def by_hand(program: Program, exact: Program, block: Block | None) -> Tensor:
    """Logits of one run of the whole with quantisers and biases of one block, or of none."""
    bypass = Bypass(program, exact)
    values = evaluate.bind_inputs(program.module, program.arguments(IDS), None)
    for each in outline(program):
        for node in each.nodes:
            at_work = block is not None and each.name == block.name
            values[node] = (
                evaluate.run_node(program.module, node, values, None) if at_work
                else bypass(node, values)
            )
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    logits = values[output.all_input_nodes[0]]
    assert isinstance(logits, Tensor)
    return logits


def test_bypassed_it_is_the_original(programs: tuple[Program, Program]) -> None:
    program, plain = programs
    exact = plain.run(IDS)
    torch.testing.assert_close(by_hand(program, plain, None), exact, rtol=ROUNDING, atol=ROUNDING)
    corrected = by_hand(program, program, None)  # with the biases that suit the quantisers
    assert not torch.allclose(corrected, exact, rtol=1e-3, atol=1e-3)


def test_bypassed_it_is_the_original_where_rounded_biases_follow_scales() -> None:
    """A shift stands on a bias that was corrected for GPTQ's codes, and that no exact one is."""
    recipe = Recipe().override(rounding="gptq", bits="4-8-8")
    for config in (ToyConfig(), ToyConfig(attention_bias=True, mlp_bias=True)):
        program = with_sites(
            config, *insertion((), seed=SEED, scaling_places=()), FoldTransforms()
        )
        plain = program.copy()
        find_ranges(program, recipe, IDS, Report(origin="toy"), SILENT, trained=True)
        assert "bias_tracked" in program.facts
        for settled in (False, True):
            if settled:
                run(program, SettleBias())
            torch.testing.assert_close(
                by_hand(program, plain, None), plain.run(IDS), rtol=ROUNDING, atol=ROUNDING
            )
        assert block_sensitivity(program, IDS, plain, SILENT)["blocks.0"] > 0.0


def test_signal_is_that_of_the_float_run(programs: tuple[Program, Program]) -> None:
    program, plain = programs
    found = measure_signal(program, IDS, plain, SILENT)
    records = (*program.weight_quantizers, *program.activation_quantizers)
    assert len(found.sqnr) == len(records)
    layer = "model.layers.1.self_attn"
    for place in (
        f"weight of {layer}.q_proj", f"input of {layer}.q_proj", f"keys of {layer}",
        f"values of {layer}", "weight of model.embed_tokens", "input of lm_head",
    ):
        assert 5.0 < found.sqnr[place] < 100.0, place
    assert f"input of {layer}.k_proj" not in found.sqnr  # q_proj is the first of its readers
    assert found.sqnr["weight of lm_head"] > found.sqnr[f"weight of {layer}.q_proj"] + 12


def test_histograms_are_of_what_enters_the_linears(programs: tuple[Program, Program]) -> None:
    program, plain = programs
    found = measure_signal(program, IDS, plain, SILENT).histograms
    down = plain.sites.mlp[0].down
    entering = input_node(plain.node(down.node))
    values: dict[Node, Tensor] = {}
    evaluate.run(plain.module, plain.arguments(IDS), watch=values.__setitem__)
    spread = found[f"input of {down.weight.removesuffix('.weight')}"]
    assert sum(spread.counts) == values[entering].numel()
    assert spread.low == pytest.approx(float(values[entering].min()), rel=ROUNDING)
    assert spread.high == pytest.approx(float(values[entering].max()), rel=ROUNDING)


def test_the_sensitivity_of_a_block_is_that_of_its_quantisers_alone(
    programs: tuple[Program, Program],
) -> None:
    program, plain = programs
    found = block_sensitivity(program, IDS, plain, SILENT)
    assert list(found) == ["embedding", "blocks.0", "blocks.1", "head"]
    for block in outline(program):
        expected = jensen_shannon(by_hand(program, plain, block), plain.run(IDS))
        assert found[block.name] == pytest.approx(float(expected), rel=1e-2), block.name
        assert 0.0 < found[block.name] < math.log(2)


def test_weights_that_are_rounded_already_keep_their_noise(
    programs: tuple[Program, Program],
) -> None:
    """As GPTQ leaves them: the float run and the noise are still those of the exact weights."""
    program, plain = programs
    rounded = program.copy()
    before = measure_signal(program, IDS, plain, SILENT)
    for record in rounded.weight_quantizers:
        module = rounded.module.get_submodule(record.module)
        weight = module(rounded.parameter(record.parameter)).detach()
        set_parameter(rounded.module, record.parameter, weight)
    assert measure_signal(rounded, IDS, plain, SILENT).sqnr == pytest.approx(before.sqnr)


def test_a_histogram_of_known_values() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = histogram(3 * torch.randn(4, 50_000, generator=generator))
    assert normal.kurtosis == pytest.approx(3.0, abs=0.05)  # its error is sqrt(24 / n) = 0.011
    assert normal.rms == pytest.approx(3.0, rel=0.01)
    assert (len(normal.counts), sum(normal.counts)) == (BINS, 200_000)
    outlier = histogram(torch.cat([torch.zeros(99), torch.tensor([-5.0])]))
    assert (outlier.low, outlier.high) == (-5.0, 0.0)
    assert outlier.counts[0] == 1
    assert outlier.counts[-1] == 99
    assert outlier.kurtosis == pytest.approx(98.01, rel=1e-3)  # (1 - 3 p q) / (p q) at p = 0.01
    assert histogram(torch.zeros(7)).kurtosis == 0.0


# --- by the command ------------------------------------------------------------------------------


def test_a_page_and_data_of_one_compilation(shop: Shop, toy: Path) -> None:
    data, page = shop.folder / "r.json", shop.folder / "r.html"
    assert shop.compile(toy, "--steps", "0", "--report", page, "--report", data) == 0, shop.said
    found = json.loads(data.read_text(encoding="utf-8"))
    plain, after = (found["sqnr_stages"][s] for s in ("plain rounding", "after transforms"))
    assert set(plain) == set(after)
    assert list(found["sqnr_stages"]) == ["plain rounding", "after transforms"]
    assert set(found["sensitivity"]) == {"embedding", "blocks.0", "head"}
    for place, stages in found["histograms"].items():
        assert place in plain
        assert list(stages) == ["plain rounding", "after transforms"]
    assert found["histograms"]
    assert "measure sensitivity" in [row["name"] for row in found["stages"]]
    text = page.read_text(encoding="utf-8")
    for words in (*found["histograms"], *found["sensitivity"], *plain):
        assert words in text, words


def test_measuring_changes_nothing_in_the_file(shop: Shop, toy: Path) -> None:
    data = shop.folder / "r.json"
    assert shop.compile(toy, "--steps", "0", "--report", data) == 0, shop.said
    measured = shop.output.read_bytes()
    assert shop.compile(toy, "--steps", "0", "--report", data, "--quick-report") == 0, shop.said
    assert shop.output.read_bytes() == measured
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["sqnr"]
    assert (found["sqnr_stages"], found["histograms"], found["sensitivity"]) == ({}, {}, {})


def test_another_ending_is_a_usage_error(shop: Shop, toy: Path) -> None:
    report = shop.folder / "report.txt"
    shop.fails(2, "expected a name that ends with .html or .json", toy, "--report", report)
    assert not report.exists()
