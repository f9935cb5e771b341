"""The comparison with ONNX Runtime sees one wrong code, and forgives a tie."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx

from fptq_compiler.graph import ops
from fptq_compiler.lower.parity import Parity, _compare, check_parity
from fptq_compiler.runtime.session_file import FULL_PRECISION
from tests.compiling import SMALL, Compiled, compile_toy, quick

SCALE, ZERO = 0.25, 3
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    path = tmp_path_factory.mktemp("parity") / "toy.onnx"
    return compile_toy(SMALL, quick("4-8-8"), path)


def compare(
    values: list[float], theirs: list[int], dtype: torch.dtype = torch.uint8, slack: float = 0.0
) -> tuple[Tensor, Parity]:
    """One quantiser of 8 bits over `values`, in steps from 0, against the runtime's codes."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    arguments = (source, SCALE, ZERO, 8, "linear input")
    node = graph.call_function(ops.fake_quantize, arguments)
    parity = Parity(slack=slack)
    x = torch.tensor(values) * SCALE
    found = _compare(node, {source: x}, torch.tensor(theirs, dtype=dtype), parity)
    return found, parity


def test_equal_codes() -> None:
    found, parity = compare([0.0, 1.2, 1.5, 2.5, -9.0, 400.0], [3, 4, 5, 5, 0, 255])
    assert (parity.codes, parity.ties, parity.wrong) == (6, 0, 0)
    expected = torch.tensor([0.0, 1.0, 2.0, 2.0, -3.0, 252.0]) * SCALE
    assert torch.equal(found, expected)


def test_codes_in_int8_are_lower_by_half_of_the_range() -> None:
    found, parity = compare([0.0, 1.2, -9.0, 400.0], [-125, -124, -128, 127], torch.int8)
    assert (parity.codes, parity.ties, parity.wrong) == (4, 0, 0)
    assert torch.equal(found, torch.tensor([0.0, 1.0, -3.0, 252.0]) * SCALE)
    _, parity = compare([0.0], [-124], torch.int8)
    assert parity.wrong == 1


@pytest.mark.parametrize(("slack", "wrong"), [(0.0, 1), (0.001, 0), (0.0005, 1)])
def test_slack_is_a_share_of_the_largest_value(slack: float, wrong: int) -> None:
    """A value of 200 steps and a thousandth of it: 0.2 of a code around each tie."""
    _, parity = compare([200.0, 1.3], [203, 5], slack=slack)
    assert (parity.ties, parity.wrong) == (1 - wrong, wrong)
    assert parity.failures() == [] or wrong


def test_slack_is_added_to_what_logits_may_differ_by() -> None:
    assert Parity(logits=2e-3).failures()
    assert Parity(logits=2e-3, slack=2e-3).failures() == []
    assert Parity(logits=2.2e-3, slack=2e-3).failures()


@pytest.mark.parametrize(("value", "theirs"), [(1.5, 4), (2.499, 6), (-0.51, 3), (1.519, 4)])
def test_a_tie_may_fall_either_way_and_is_taken_over(value: float, theirs: int) -> None:
    found, parity = compare([0.0, value], [3, theirs])
    assert (parity.codes, parity.ties, parity.wrong) == (2, 1, 0)
    assert float(found[1]) == (theirs - ZERO) * SCALE
    assert parity.failures() == []


@pytest.mark.parametrize(("value", "theirs"), [(1.2, 5), (1.45, 5), (1.5, 6), (300.0, 254)])
def test_any_other_difference_is_wrong(value: float, theirs: int) -> None:
    _, parity = compare([0.0, value], [3, theirs])
    assert (parity.codes, parity.ties, parity.wrong) == (2, 0, 1)
    (words,) = parity.failures()
    assert words.startswith("1 of 2 activation codes differ away from any tie")


def test_logits_that_are_not_numbers_fail() -> None:
    (words,) = Parity(logits=float("nan")).failures()
    assert words.startswith("the logits differ by nan")


def test_the_written_file_is_the_program(compiled: Compiled, tmp_path: Path) -> None:
    parity = check_parity(compiled.program, compiled.path, IDS, tmp_path, FULL_PRECISION)
    assert parity.failures() == []
    assert parity.weight_codes_equal
    # The inputs of q k v, of o, of gate and up, of down, of the head, and K and V.
    widths = 32 + 32 + 32 + 48 + 32 + 16 + 16
    assert parity.codes == IDS.numel() * widths
    assert list(tmp_path.iterdir()) == []


def test_one_weight_code_apart(compiled: Compiled, tmp_path: Path) -> None:
    model = compiled.model
    tensor = next(t for t in model.graph.initializer if t.name.endswith("down_proj.weight_codes"))
    codes = onnx.numpy_helper.to_array(tensor).astype(np.int8)
    codes[5, 7] += 1 if codes[5, 7] < 7 else -1
    tensor.CopyFrom(onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4), tensor.name))
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    parity = check_parity(compiled.program, path, IDS, tmp_path, FULL_PRECISION)
    assert not parity.weight_codes_equal
    assert parity.failures()[0] == "the weight codes in the file are not the program's"


def test_an_activation_scale_apart(compiled: Compiled, tmp_path: Path) -> None:
    """Two per cent: many codes move by one, away from any tie."""
    model = compiled.model
    steps = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    first = next(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
    assert first in steps
    change_scalar(model, first, 1.02)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    parity = check_parity(compiled.program, path, IDS, tmp_path, FULL_PRECISION)
    assert parity.weight_codes_equal
    assert parity.wrong > 10
    assert any("differ away from any tie" in words for words in parity.failures())


def change_scalar(model: onnx.ModelProto, name: str, factor: float) -> None:
    """Multiply a scalar, which stands as an initialiser or as a Constant."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            value = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
            return
    for node in model.graph.node:
        if name in node.output:
            (attribute,) = node.attribute
            attribute.f *= factor
            return
    pytest.fail(f"no constant {name}")


def test_a_program_with_another_count_of_quantisers_is_refused(
    compiled: Compiled, tmp_path: Path
) -> None:
    model = compiled.model
    quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    extra = onnx.helper.make_node("QuantizeLinear", list(quantizer.input), ["extra"])
    model.graph.node.append(extra)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    with pytest.raises(ValueError, match=r"8 QuantizeLinear in the file, 7 in the program"):
        check_parity(compiled.program, path, IDS, tmp_path, FULL_PRECISION)
