"""Which type linear layers multiply in: bfloat16 where the processor has it, by a measurement."""

from __future__ import annotations

import time

import torch

ROWS, CHANNELS, ROUNDS = 256, 1024, 3
WORTH = 1.3  # times faster, or float32 stays


def faster_type(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are WORTH times faster than those of float32."""
    seconds = {dtype: _product_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    faster = seconds[torch.float32] > WORTH * seconds[torch.bfloat16]
    return torch.bfloat16 if faster else torch.float32


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The least of a few products, after one that warms up."""
    x = torch.ones(ROWS, CHANNELS, dtype=dtype, device=device)
    weight = torch.ones(CHANNELS, CHANNELS, dtype=dtype, device=device)
    found = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        float((x @ weight)[0, 0])  # waits for the device
        found.append(time.perf_counter() - started)
    return min(found[1:])
