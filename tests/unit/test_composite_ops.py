"""The composite operators: what tracing believes of their results is what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fptq_compiler.graph import ops

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 8, generator=GENERATOR)
HALF = X.half()
HEADS = X.reshape(2, 5, 4, 2).transpose(1, 2)
CODES = torch.randint(-8, 8, (8, 6), generator=GENERATOR, dtype=torch.int8)
PAIRS = torch.randint(0, 256, (7, 4), generator=GENERATOR, dtype=torch.uint8)
IDS = torch.tensor([[0, 6, 2], [1, 1, 5]])
SCALE, ROW_SCALE = torch.rand(6, generator=GENERATOR) + 0.1, torch.rand(7, generator=GENERATOR)

CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sum_of_squares": (ops.sum_of_squares, (X,)),
    "sum_of_squares float16": (ops.sum_of_squares, (HALF,)),
    "sum_of_squares float64": (ops.sum_of_squares, (X.double(),)),
    "unit_rms": (ops.unit_rms, (X,)),
    "unit_rms float16": (ops.unit_rms, (HALF,)),
    "rms_norm": (ops.rms_norm, (X, None, 1e-6)),
    "rms_norm float16 with a wide gain": (ops.rms_norm, (HALF, torch.ones(8), 1e-6)),
    "attention": (ops.attention, (HEADS, HEADS, HEADS, None, True, 0.5)),
    "attention grouped": (ops.attention, (HEADS, HEADS[:, :2], HEADS[:, :2], None, True, 0.5)),
    "fake_quantize": (ops.fake_quantize, (X, 0.1, 3, 8, "linear input")),
    "fake_quantize float16": (ops.fake_quantize, (HALF, 0.1, 3, 4, "key")),
    "fake_quantize transposed": (ops.fake_quantize, (HEADS, 0.1, 3, 4, "key")),
    "linear": (ops.linear, (X, CODES, SCALE, None, 4, 0)),
    "linear biased, in blocks": (ops.linear, (X, CODES, SCALE.expand(2, 6), SCALE, 4, 4)),
    "linear float16, wide bias": (ops.linear, (HALF, CODES, SCALE, SCALE, 4, 0)),
    "embedding": (ops.embedding, (IDS, PAIRS.view(torch.int8), ROW_SCALE, 8)),
    "embedding of pairs": (ops.embedding, (IDS, PAIRS, ROW_SCALE, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fake_kernel_gives_shape_and_type(case: str) -> None:
    operator, arguments = CASES[case]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
