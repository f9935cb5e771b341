"""8-bit weights are summed exactly also where pairs of products exceed 16 bits, on any processor.

On x64 without VNNI ONNX Runtime's kernel for UINT8 activations and INT8 weights saturates there,
so files hold weights that it sees as UINT8.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fptq_compiler.lower.contract import optimized_graph
from tests.compiling import SMALL, Compiled, compile_toy, quick
from tests.toys import make_tokens


@pytest.fixture(scope="module", params=["qdq", "ort-cpu"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    path = tmp_path_factory.mktemp("saturation") / "toy.onnx"
    return compile_toy(SMALL, quick("4-8-8", target=request.param), path)


def test_no_int8_kernel_gets_weights_that_could_saturate_it(
    compiled: Compiled, tmp_path: Path
) -> None:
    optimized = optimized_graph(compiled.path, tmp_path, {})
    fused = [n for n in optimized.graph.all_nodes() if n.op_type == "MatMulIntegerToFloat"]
    weights = [n.inputs[1] for n in fused]
    kinds = Counter(str(w.dtype) for w in weights if w is not None)
    assert kinds == {"INT8": 7, "UINT8": 1}  # 4-bit codes, and those of the head


def test_a_session_without_settings_is_exact(compiled: Compiled) -> None:
    """As someone would open it who does not know of the session file."""
    session = onnxruntime.InferenceSession(compiled.path, providers=["CPUExecutionProvider"])
    ids = make_tokens(SMALL, 2, 16)
    (entry,) = session.get_inputs()
    (found,) = session.run(["logits"], {entry.name: ids.numpy().astype(np.int64)})
    expected = compiled.program.run(ids).numpy()
    # Codes at ties may differ; saturated sums are off by a tenth of the largest logit.
    error = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(error) < 1e-4
