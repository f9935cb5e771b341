"""Which type linear layers multiply in: bfloat16 where the processor has instructions for it."""

from __future__ import annotations

from typing import Final

import torch

INSTRUCTIONS: Final = ("amx_bf16", "avx512_bf16", "bf16")


def faster_type(device: torch.device) -> torch.dtype:
    """By what the processor says of itself, so that a training that goes on takes the same."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        said = torch.cpu.get_capabilities()
        has = any(said.get(name, False) for name in INSTRUCTIONS)
    return torch.bfloat16 if has else torch.float32
