"""How learning rates go over the steps."""

from __future__ import annotations

import math

FLOOR = 0.05  # of the full rate, at the last step


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Rises linearly over the warm-up, then falls as a half cosine to FLOOR.

    Args:
        step: from 0.
        steps: in all.
        warmup: share of the steps.
    """
    rising = warmup * steps
    if step + 1 < rising:
        return (step + 1) / rising
    done = (step + 1 - rising) / max(steps - rising, 1)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2
