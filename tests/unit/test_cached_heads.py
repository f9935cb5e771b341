"""Heads of other sizes and rotations in files with a KV cache: which kernel, the same logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fptq_compiler.runtime.session import load
from tests.cached_toy import (
    ALIGNED,
    CHUNKS,
    CLOSE,
    FLOAT,
    ONE_BY_ONE,
    PER_CHANNEL,
    Compile,
    branches,
)
from tests.decoding import decode, error, random_ids
from tests.onnx_nodes import every_node
from tests.toys import make_toy, name_spelling

NARROW = replace(ALIGNED, layers=1, head_dim=8)
FORMS = {
    "rotated 8": (NARROW, False),
    "rotated 8 of 16": (replace(ALIGNED, layers=1, rope="partial"), False),
    "rotated 16 of 32": (replace(ALIGNED, layers=1, rope="partial", head_dim=32), True),
    "interleaved": (replace(ALIGNED, layers=1, rope="interleaved"), True),
    "complex": (replace(ALIGNED, layers=1, rope="complex"), True),
    "no rope": (replace(ALIGNED, layers=1, rope="none"), True),
    "one key head": (replace(ALIGNED, layers=1, kv_heads=1), True),
    "no groups, biases": (
        replace(ALIGNED, layers=1, kv_heads=4, attention_bias=True, output_bias=True), True
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_heads_on_ort_cpu(cached_toy: Compile, name: str) -> None:
    """The fused kernel takes head sizes and rotated widths that are multiples of 16."""
    config, fused = FORMS[name]
    compiled = cached_toy("ort-cpu", FLOAT, config)
    assert (len(branches(compiled.model)) == 1) == fused
    kernels = {n.op_type for n in every_node(compiled.model.graph)}
    assert ("GroupQueryAttention" in kernels) == fused
    ids = random_ids(2, 12)
    original = make_toy(config)(torch.from_numpy(ids)).numpy()
    model = load(compiled.path, threads=1)
    for bounds in ([0, 12], ONE_BY_ONE, CHUNKS):
        assert error(decode(model, ids, bounds)[0], original) <= CLOSE


@pytest.mark.parametrize("bits", ["4-8-8", "4-4-4", *PER_CHANNEL])
def test_a_narrow_head_falls_back_with_a_quantised_cache(cached_toy: Compile, bits: str) -> None:
    compiled = cached_toy("ort-cpu", bits, NARROW)
    assert not branches(compiled.model)
    model = load(compiled.path, threads=1)
    ids = random_ids(2, 12)
    whole, _ = model.step(ids, model.start(2))
    assert error(decode(model, ids, ONE_BY_ONE)[0], whole) <= CLOSE


def test_forms_have_names_of_their_own() -> None:
    assert len({name_spelling(config) for config, _ in FORMS.values()}) == len(FORMS)
