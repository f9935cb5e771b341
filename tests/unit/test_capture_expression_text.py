"""The grammar of sizes: what torch prints passes, what could run is refused."""

import pytest
import torch

from fptq_compiler.capture.expression_text import check_expression, check_guard
from fptq_compiler.errors import CaptureError


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "8*s70 + 1",
        "s0**2",
        "-s0",
        "Symbol('s70', positive=True, integer=True)",
        "Mul(Integer(8), Symbol('s70', positive=True, integer=True))",
        "Pow(Symbol('s70', positive=True, integer=True), Integer(2))",
        "FloorDiv(s1, 2)",
        "Mod(s0 + 3, 8)",
        "Max(1, s0)",
        "Eq(s0, 4)",
        "s0 >= 2",
        "(s0 < 3) & (s1 != 4)",
        "Float('0.5', precision=53)",
        "Add(Integer(-1), Symbol('u0', integer=True))",
        "9223372036854775807",
    ],
)
def test_sizes_pass(text: str) -> None:
    check_expression(text, "model.json")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "s0.__class__",
        "(lambda: 1)()",
        "[x for x in s0]",
        "exec('1')",
        "sympify('s0')",
        "Symbol(__import__('os'))",
        "Symbol('s0', positive=exec('1'))",
        "Symbol('os')",
        "Integer(base=1)",
        "Float(exec('1'))",
        "f's0'",
        "s0 if s1 else s2",
        "s0[0]",
        "9**9**9",
        "9**99999",
        "Pow(Pow(9, 16), 16)",
        "Pow(9, s0)",
        "s0\n+1",
        "'text'",
        "",
        "(" * 3000 + "1" + ")" * 3000,
        7,
    ],
)
def test_code_is_refused(text: object) -> None:
    with pytest.raises(CaptureError, match=r"model\.json: field 'expr_str' holds") as caught:
        check_expression(text, "model.json")
    assert "Export the model again" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["L['ids'].size()[1] >= 2", "Mod(L['ids'].size()[0], 8) == 0", "L['x'].stride()[0] != 1"],
)
def test_guards_pass(text: str) -> None:
    check_guard(text, "model.json")


@pytest.mark.parametrize(
    "text",
    [
        "L['ids'].tolist()",
        "L['ids'].size(exec('1'))",
        "__import__('os')",
        "L.__class__.size()",
        "L['a\" + b'].size()[0] == 1",
    ],
)
def test_guards_with_code_are_refused(text: str) -> None:
    with pytest.raises(CaptureError, match="'guards_code'"):
        check_guard(text, "model.json")


def test_what_torch_prints_passes() -> None:
    """Every size of a program with products, powers, divisions and remainders."""

    class Sizes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, columns = x.shape
            torch._check(columns % 4 == 0)
            halves = torch.ones(rows * columns // 4 + 1, max(rows, 3))
            return halves.sum() + x.reshape(rows, columns // 4, 4).repeat(1, rows, 1).sum()

    from torch._export.serde.serialize import ExportedProgramSerializer

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Sizes(), (torch.ones(6, 8),), dynamic_shapes=({0: dynamic, 1: torch.export.Dim.AUTO},)
    )
    artifact = ExportedProgramSerializer().serialize(program)
    texts = set(_expressions(artifact.exported_program))
    assert len(texts) >= 4
    for text in texts:
        check_expression(text, "model.json")


def _expressions(value: object) -> list[str]:
    """Every expr_str of a serialised program."""
    import json

    from torch._export.serde.serialize import _to_json_bytes

    def walk(item: object) -> list[str]:
        if isinstance(item, dict):
            own = [item["expr_str"]] if "expr_str" in item else []
            return own + [text for child in item.values() for text in walk(child)]
        if isinstance(item, list):
            return [text for child in item for text in walk(child)]
        return []

    return walk(json.loads(_to_json_bytes(value)))
