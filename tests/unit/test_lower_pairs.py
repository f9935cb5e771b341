"""Codes two to a byte, read back by ONNX Runtime as `quant.pairs` reads them."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fptq_compiler.lower.emitter import Emitter
from fptq_compiler.lower.targets.pairs import unpack_pairs as emit
from fptq_compiler.quant.pairs import unpack_pairs

EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("shape", "unpacked"), [((4, 8, 8), (0, 0, 16)), ((2, 4, 4, 8), (0, 0, -1, 16))]
)
def test_every_byte(shape: tuple[int, ...], unpacked: tuple[int, ...]) -> None:
    packed = EVERY_BYTE.reshape(shape)
    uint8, sizes = ir.TensorType(ir.DataType.UINT8), [None] * len(shape)
    given = ir.Value(name="packed", type=uint8, shape=ir.Shape(sizes))
    op = Emitter("pairs")
    found = emit(op, given, unpacked)
    found.type, found.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(sizes)
    graph = ir.Graph([given], [found], nodes=op.nodes, opset_imports={"": 21}, name="pairs")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (codes,) = session.run(None, {"packed": packed.numpy()})
    assert torch.equal(torch.from_numpy(codes), unpack_pairs(packed).float())
