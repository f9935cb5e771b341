"""Odd graphs on the whole way: each compiles and is right, or is refused by what is odd."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from fptq_compiler import driver
from fptq_compiler.cli.entry import run
from fptq_compiler.cli.inspect import command as inspect
from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.unlift import unlift
from tests import odd_models
from tests.compiling import quick, run_onnx
from tests.odd_models import (
    ONE,
    THREE,
    UNKNOWN,
    Around,
    Odd,
    Shifted,
    export_odd,
    half_known,
    shared_blocks,
)
from tests.shop import Shop
from tests.toys import make_tokens

FLOAT = "16-16-16"
SAME = 1e-4
"""Of the largest logit: float32 in ONNX Runtime and in torch, with transforms folded."""


def saved(module: nn.Module, path: Path) -> Path:
    torch.export.save(export_odd(module), path)
    return path


def calibration(folder: Path) -> tuple[str, str]:
    """Words that calibrate on token ids, so that no model has to write text."""
    path = folder / "ids.npy"
    np.save(path, make_tokens(THREE, 4, 24).numpy())
    return "--calibration", str(path)


def assert_same(module: nn.Module, path: Path, ids: Tensor) -> None:
    found = module(ids)
    expected = found["logits"] if isinstance(found, dict) else found
    error = (run_onnx(path, ids) - expected).abs().max() / expected.abs().max()
    assert error <= SAME


# --- blocks that no pass knows -------------------------------------------------------------------


def test_an_unknown_block_is_compiled_loudly(shop: Shop) -> None:
    model, module = shop.folder / "half.pt2", half_known()
    report = shop.folder / "report.json"
    words = ("--report", str(report), *calibration(shop.folder))
    assert shop.compile(saved(module, model), *words) == 0, shop.said
    said = " ".join(shop.said.split())
    for words in ("NOT RECOGNISED", f"block: {UNKNOWN}", "mix:", "odd_models.py:"):
        assert words in said
    early = said.index(f"not recognised: {UNKNOWN}")
    assert early < said.index("lowering to ONNX ...")
    content = json.loads(report.read_text(encoding="utf-8"))
    (row,) = content["unrecognised"]
    assert (row["kind"], row["place"]) == ("block", UNKNOWN)
    known = {s["name"]: s["transforms"] for s in content["sites"]}
    assert known["model.layers.2.self_attn"] == ["prerope", "value"]
    assert known["model.layers.0.mlp"] == ["updown", "hadamard"]
    written = {t.name for t in onnx.load(shop.output).graph.initializer}
    assert "model.layers.1.mix.weight_codes" in written  # quantised all the same


def test_an_unknown_block_changes_nothing_else(shop: Shop) -> None:
    module = half_known()
    model = saved(module, shop.folder / "half.pt2")
    assert shop.compile(model, recipe=quick(FLOAT)) == 0, shop.said
    assert_same(module, shop.output, make_tokens(THREE, 2, 11))


def test_demanded_transforms_need_a_known_model(shop: Shop) -> None:
    model = saved(half_known(), shop.folder / "half.pt2")
    shop.fails(3, f"found parts that are not: {UNKNOWN}", model, "--transforms", "value,updown")
    assert "--transforms auto" in shop.said
    assert "block at linear" in shop.said
    demands_nothing = ("--transforms", "none", "--bits", FLOAT)
    assert shop.compile(model, *demands_nothing) == 0, shop.said


def test_a_known_model_has_no_such_table(shop: Shop, toy: Path) -> None:
    assert shop.compile(toy, recipe=quick(FLOAT)) == 0
    assert "NOT RECOGNISED" not in shop.said + shop.shown


# --- weights that blocks share -------------------------------------------------------------------


def test_blocks_that_share_weights(shop: Shop) -> None:
    module = shared_blocks()
    model = saved(module, shop.folder / "shared.pt2")
    assert shop.compile(model, recipe=quick(FLOAT)) == 0, shop.said
    assert_same(module, shop.output, make_tokens(THREE, 2, 11))


def test_blocks_that_share_weights_are_quantised_apart(shop: Shop) -> None:
    model = saved(shared_blocks(), shop.folder / "shared.pt2")
    words = calibration(shop.folder)
    assert shop.compile(model, *words) == 0, shop.said  # 4-8-8, compared code by code
    assert "gets its own copy of model.layers.1.self_attn.q_proj.weight" in shop.shown


# --- control flow and values ---------------------------------------------------------------------


@pytest.mark.parametrize("odd", [odd_models.condition, odd_models.loop, odd_models.each])
def test_control_flow_is_refused(odd: Odd) -> None:
    program = export_odd(Around(odd).eval(), ONE)
    with pytest.raises(UnsupportedModelError, match="expected a graph without control flow"):
        unlift(program)


def test_control_flow_in_an_archive(shop: Shop) -> None:
    model = saved(Around(odd_models.condition).eval(), shop.folder / "odd.pt2")
    shop.fails(3, "node cond (cond) runs other graphs", model)
    assert "odd_models.py" in shop.said
    assert run(inspect, [str(model)]) == 3


def test_a_size_that_depends_on_values_is_kept(shop: Shop) -> None:
    module = Around(odd_models.chosen_by_value).eval()
    model = saved(module, shop.folder / "odd.pt2")
    assert shop.compile(model, recipe=quick(FLOAT)) == 0, shop.said
    for ids in (torch.zeros(2, 9, dtype=torch.int64), torch.full((2, 9), 30)):
        assert_same(module, shop.output, ids)


def test_an_operator_of_another_library(tmp_path: Path) -> None:
    twice = torch.library.custom_op("odd::twice", _twice, mutates_args=())
    twice.register_fake(torch.empty_like)
    program = export_odd(Around(lambda model, ids: twice(model.toy(ids))).eval(), ONE)
    path = tmp_path / "odd.onnx"
    with pytest.raises(UnsupportedModelError, match=r"odd\.twice\.default\) is a custom operator"):
        driver.compile_model(program, path, options=driver.Options(recipe=quick(FLOAT)))
    assert not path.exists()


def _twice(x: Tensor) -> Tensor:
    return x * 2


# --- state and randomness ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("odd", "training", "message"),
    [
        (odd_models.counting, False, "changes buffer steps in place"),
        (odd_models.normalized, True, "normalises by the statistics of the batch"),
        (odd_models.dropped, True, "draws random numbers"),
    ],
    ids=["counter", "batch norm", "dropout"],
)
def test_what_a_run_leaves_behind_is_refused(
    shop: Shop, odd: Odd, training: bool, message: str
) -> None:
    model = saved(Around(odd).train(training), shop.folder / "odd.pt2")
    shop.fails(3, message, model)
    assert "model.eval()" in shop.said
    assert "odd_models.py" in shop.said


@pytest.mark.parametrize(
    "odd", [odd_models.counted, odd_models.normalized, odd_models.dropped]
)
def test_what_leaves_nothing_that_is_read_compiles(shop: Shop, odd: Odd) -> None:
    module = Around(odd).eval()
    model = saved(module, shop.folder / "odd.pt2")
    assert shop.compile(model, recipe=quick(FLOAT)) == 0, shop.said
    assert_same(module, shop.output, make_tokens(ONE, 2, 11))


# --- inputs and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("odd", "found"),
    [
        (odd_models.complex_logits, "the model gives complex64 ("),
        (odd_models.answers, "the model gives int64 ("),
        (odd_models.one_number, "the model gives float32 ("),
        (odd_models.hidden_first, "the first is not as wide as the vocabulary"),
    ],
)
def test_outputs_that_are_no_logits(shop: Shop, odd: Odd, found: str) -> None:
    model = saved(Around(odd).eval(), shop.folder / "odd.pt2")
    shop.fails(3, found, model)
    assert "expected" in shop.said
    assert "Export a forward that returns" in shop.said


def test_of_several_outputs_the_logits_are_written(shop: Shop) -> None:
    module = Around(odd_models.with_probabilities).eval()
    model = saved(module, shop.folder / "odd.pt2")
    assert shop.compile(model, recipe=quick(FLOAT)) == 0, shop.said
    assert [value.name for value in onnx.load(shop.output).graph.output] == ["logits"]
    assert_same(module, shop.output, make_tokens(ONE, 2, 11))


def test_an_input_without_a_plain_value(tmp_path: Path) -> None:
    module, ids = Shifted().eval(), make_tokens(ONE, 2, 7)
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        module, (ids, torch.zeros(2, 7, 1)), dynamic_shapes=(free, free), strict=False
    )
    path = tmp_path / "odd.onnx"
    with pytest.raises(UnsupportedModelError, match="input shift is float32"):
        driver.compile_model(program, path, options=driver.Options(recipe=quick(FLOAT)))
    assert not path.exists()
