"""Weights in the layout of com.microsoft.MatMulNBits, which is what the CUDA provider multiplies.

    codes  (K, N) signed            ->  (N, ceil(K / block), block * bits / 8) UINT8
    scale  (N,) or (blocks, N)      ->  (N, ceil(K / block))

Codes are shifted by 2^(bits - 1), the zero-point that the operator assumes without one; the even
channel of a pair stands in the low half. Channels behind K are zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BLOCKS = "_blocks"  # ends the name of what is cut into them
BLOCK = 32  # the only size of the fast kernel for half precision times integer


def pack_blocks(codes: Array, bits: int, block: int = BLOCK) -> Array:
    """Codes (K, N) of 4 or 8 bits as MatMulNBits takes them."""
    inputs, outputs = codes.shape
    blocks = -(-inputs // block)
    zero = 1 << (bits - 1)
    shifted = np.full((outputs, blocks * block), zero, np.uint8)
    shifted[:, :inputs] = (codes.T.astype(np.int16) + zero).astype(np.uint8)
    if bits == 4:
        shifted = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return shifted.reshape(outputs, blocks, -1)


def unpack_blocks(packed: Array, inputs: int, bits: int) -> Array:
    """Codes (K, N) in INT8: what `pack_blocks` was given."""
    flat = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        flat = np.stack((flat & 15, flat >> 4), -1).reshape(packed.shape[0], -1)
    zero = 1 << (bits - 1)
    return (flat[:, :inputs].astype(np.int16) - zero).astype(np.int8).T


def spread_scale(scale: Array, inputs: int, given: int, block: int) -> Array:
    """Scales (ceil(K / block), N) of a weight that has one a channel, or a block of `given`.

    Args:
        scale: (N,), or (ceil(K / given), N).
        inputs: K.
        given: input channels that share a scale; 0 is all of them.
        block: divides `given`.
    """
    blocks = -(-inputs // block)
    if not given:
        return np.tile(scale, (blocks, 1))
    return np.repeat(scale, given // block, 0)[:blocks]
