"""The comparison of a file with ONNX Runtime covers what its KV cache stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fptq_compiler.lower.parity import check_parity
from fptq_compiler.runtime.session_file import FULL_PRECISION, SessionFile
from tests.cached_toy import TARGETS, Compile, branches

PROBE = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("bits", ["4-16-8", "4-16-4 per-channel"])
@pytest.mark.parametrize("target", TARGETS)
def test_parity_compares_what_is_stored(
    cached_toy: Compile, target: str, bits: str, tmp_path: Path
) -> None:
    compiled = cached_toy(target, bits)
    config = SessionFile.read(compiled.path).session_config
    parity = check_parity(compiled.program, compiled.path, PROBE, tmp_path, config)
    assert parity.failures() == []
    # Nothing else is quantised: keys and values of 2 heads of 16 channels in 2 layers.
    assert parity.codes == PROBE.numel() * 2 * 2 * 2 * 16
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", ["4-16-8", "4-16-4 per-channel"])
@pytest.mark.parametrize("which", [0, 1], ids=["one", "many"])
def test_parity_sees_another_scale_in_one_branch(
    cached_toy: Compile, which: int, bits: str, tmp_path: Path
) -> None:
    """A tenth more: codes away from zero move by more than a tie."""
    compiled = cached_toy("ort-cpu", bits)
    model = compiled.model
    right = compiled.initializers()["cache.0.key_scale"]
    wrong = np.float32(1.1) * numpy_helper.to_array(right)
    model.graph.initializer.append(numpy_helper.from_array(wrong, "wrong"))
    changed = 0
    for node in branches(model)[0][which].node:
        for place, name in enumerate(node.input):
            if name == right.name:
                node.input[place] = "wrong"
                changed += 1
    assert changed >= 1
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    parity = check_parity(compiled.program, path, PROBE, tmp_path, FULL_PRECISION)
    assert parity.wrong > 10
    assert any("differ away from any tie" in words for words in parity.failures())
