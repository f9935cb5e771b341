"""A frozen program is traced once on its way to ONNX, and again only where that is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fptq_compiler.graph.unlift import unlift
from fptq_compiler.lower.export import to_onnx
from fptq_compiler.lower.targets import target_of

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Plain(nn.Module):
    """Embedding, cast, linear: all operators have translations."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(11, 4, generator=generator))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = nn.functional.embedding(input_ids, self.table)
        return x * input_ids.unsqueeze(-1).to(torch.float32)


class InPlace(Plain):
    """One operator writes to its input."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).mul_(2.0)


class Composite(Plain):
    """One operator has no translation, only a decomposition."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.hardshrink(super().forward(input_ids))


def translated(model: nn.Module) -> ir.Model:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    exported = torch.export.export(
        model, (IDS,), dynamic_shapes={"input_ids": sizes}, strict=False
    )
    return to_onnx(unlift(exported), target_of("qdq"))


def check(model: nn.Module) -> None:
    session = onnxruntime.InferenceSession(ir.to_proto(translated(model)).SerializeToString())
    (found,) = session.run(None, {"input_ids": IDS.numpy()})
    np.testing.assert_allclose(found, model(IDS).detach().numpy(), rtol=1e-6)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that the exporter traced a second time."""
    seen: list[ExportedProgram] = []
    decompose = ExportedProgram.run_decompositions

    def watched(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        seen.append(program)
        return decompose(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", watched)
    return seen


def test_what_has_translations_is_traced_once(decomposed: list[ExportedProgram]) -> None:
    check(Plain())
    assert decomposed == []


@pytest.mark.parametrize("kind", [InPlace, Composite])
def test_the_rest_is_decomposed(kind: type[Plain], decomposed: list[ExportedProgram]) -> None:
    check(kind())
    assert len(decomposed) == 1
