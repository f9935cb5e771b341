"""Check a GGUF file before any library maps it: magic, version, and that all tensors are there.

Layout (little endian): "GGUF", version u32, number of tensors u64, number of keys u64, the keys
(string, type u32, value), the tensor table (string, rank u32, sizes u64 each, type u32, offset
u64), padding to the alignment, the data.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf

from fptq_compiler.errors import CaptureError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_LONGEST_NAME = 1 << 16
_LARGEST_COUNT = 1 << 20
_DEFAULT_ALIGNMENT = 32


@dataclass
class _Reader:
    """Reads numbers and strings, and never past the end of the file."""

    file: IO[bytes]
    size: int

    def skip(self, count: int) -> None:
        if count < 0 or self.file.tell() + count > self.size:
            raise EOFError
        self.file.seek(count, 1)

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise EOFError
        return data

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> bytes:
        length = self.u64()
        if length > _LONGEST_NAME:
            raise EOFError
        return self.take(length)

    def skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.u64())
        elif kind == _ARRAY:
            inner, count = self.u32(), self.u64()
            if inner in _SCALARS:
                self.skip(_SCALARS[inner] * count)
            else:
                for _ in range(min(count, self.size)):
                    self.skip_value(inner)
        else:
            message = f"value type {kind} is not known"
            raise ValueError(message)


def check_gguf(path: Path) -> None:
    """Read the tables of a GGUF file and compare them with its length.

    Raises:
        CaptureError: not GGUF, a version that nobody reads, or truncated (naming the tensor).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if file.read(4) != MAGIC:
            message = f"{path.name}: does not begin with 'GGUF', expected a GGUF file."
            raise CaptureError(message)
        try:
            _check_tables(reader, path.name)
        except (EOFError, RecursionError):
            message = (
                f"{path.name}: the file ends inside its tables ({size} bytes): it is truncated "
                "or damaged. Copy it again."
            )
            raise CaptureError(message) from None
        except ValueError as error:
            message = f"{path.name}: the tables are damaged ({error}). Copy the file again."
            raise CaptureError(message) from None


def _check_tables(reader: _Reader, origin: str) -> None:
    version = reader.u32()
    if version not in _VERSIONS:
        message = (
            f"{origin}: GGUF version {version}, expected 2 or 3 (little endian). Convert the "
            "file again with a current llama.cpp."
        )
        raise CaptureError(message)
    tensors, keys = reader.u64(), reader.u64()
    if tensors > _LARGEST_COUNT or keys > _LARGEST_COUNT:
        message = f"{tensors} tensors and {keys} keys"
        raise ValueError(message)
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(keys):
        key, kind = reader.string(), reader.u32()
        if key == b"general.alignment" and kind == _UINT32:
            alignment = max(1, reader.u32())
        else:
            reader.skip_value(kind)
    if tensors == 0:
        message = f"{origin}: the file holds no tensors (a vocabulary only?), expected a model."
        raise CaptureError(message)
    ends = [_tensor_end(reader) for _ in range(tensors)]
    start = math.ceil(reader.file.tell() / alignment) * alignment
    name, end = max(ends, key=lambda item: item[1])
    if start + end > reader.size:
        message = (
            f"{origin}: tensor {name!r} ends at byte {start + end}, but the file has "
            f"{reader.size} bytes: it is truncated. Copy it again."
        )
        raise CaptureError(message)


def _tensor_end(reader: _Reader) -> tuple[str, int]:
    """Name of a tensor and where its data ends, in bytes from the start of the data."""
    name = reader.string().decode("utf-8", "replace")
    rank = reader.u32()
    if rank > 8:
        message = f"tensor {name!r} has rank {rank}"
        raise ValueError(message)
    elements = math.prod(reader.u64() for _ in range(rank))
    kind, offset = reader.u32(), reader.u64()
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return name, offset + math.ceil(elements / block) * width
