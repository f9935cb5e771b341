"""Run a compiled file chunk by chunk."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fptq_compiler.runtime.model import Cache, Model
from tests.toys import ToyConfig

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def random_ids(*shape: int, seed: int = 3) -> Ids:
    return np.random.default_rng(seed).integers(ToyConfig.vocabulary, size=shape)


def decode(model: Model, ids: Ids, bounds: list[int]) -> tuple[Logits, Cache]:
    """Logits of all tokens and the last cache, from chunks between the bounds."""
    cache, found = model.start(ids.shape[0]), []
    for start, stop in pairwise(bounds):
        logits, cache = model.step(ids[:, start:stop], cache)
        found.append(logits)
    return np.concatenate(found, 1), cache


def error(found: Logits, expected: Logits) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
