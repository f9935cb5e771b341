"""The parts of a torch.export archive: what may be in it, and whether each is what it claims.

The archive is a zip file with one root folder. Its parts are stored uncompressed, so that the
size of the file bounds the memory that reading it can take.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, NoReturn

import torch
from torch._export.serde.schema import ScalarType
from torch._export.serde.serialize import deserialize_scalar_type

from fptq_compiler.capture.archive_reader import SAMPLES
from fptq_compiler.errors import CaptureError

_CHUNK = 1 << 22  # bytes read at a time while checking checksums
_LONGEST_TEXT = 1 << 30  # bytes of JSON that are parsed at all
_EXPANDED = 1 << 24  # bytes that a tensor with zero strides may claim beyond its part
_PAYLOAD = re.compile(r"(weight|tensor)_\d{1,9}", re.ASCII)
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[a-z_]+|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(weights|constants)/model\.pt"
    r"|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|(tensor|custom_obj|opaque_obj)_\d+)"
    r"|extra/.+",
    re.ASCII,
)


class ArchiveParts:
    """A checked view of the zip file, by the names that torch uses (without the root folder)."""

    def __init__(self, zipped: zipfile.ZipFile, origin: str) -> None:
        """Check the table of contents.

        Raises:
            CaptureError: a part is duplicated, compressed, unknown or outside the root folder.
        """
        self._zipped = zipped
        self._origin = origin
        self._entries: dict[str, zipfile.ZipInfo] = {}
        root = zipped.namelist()[0].split("/")[0]
        for entry in zipped.infolist():
            folder, _, name = entry.filename.partition("/")
            if folder != root or not _KNOWN.fullmatch(name) or ".." in name.split("/"):
                self._refuse(entry.filename, "does not belong into a torch.export archive")
            if name in self._entries:
                self._refuse(name, "is there twice")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                self._refuse(name, "is compressed or claims a wrong size, expected it stored")
            if entry.flag_bits & 1:
                self._refuse(name, "is encrypted")
            self._entries[name] = entry
        for name in ("archive_format", "archive_version", "models/model.json"):
            if name not in self._entries:
                self._refuse(name, "is missing")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """The parts in file order."""
        return list(self._entries)

    def size(self, name: str) -> int:
        """Size of a part in bytes."""
        if name not in self._entries:
            self._refuse(name, "is missing")
        return self._entries[name].file_size

    def read(self, name: str) -> bytes:
        """The bytes of a part."""
        self.size(name)
        return self._zipped.read(self._entries[name])

    def read_json(self, name: str) -> Any:
        """The parsed JSON of a part.

        Raises:
            CaptureError: it is not JSON.
        """
        if self.size(name) > _LONGEST_TEXT:
            self._refuse(name, f"has {self.size(name)} bytes, more than any graph needs")
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            self._refuse(name, f"is not JSON ({error})")

    def check_checksums(self) -> None:
        """Read every part once, a few megabytes at a time.

        Raises:
            CaptureError: a checksum does not match, or the data ends early.
        """
        for name, entry in self._entries.items():
            try:
                with self._zipped.open(entry) as stream:
                    while stream.read(_CHUNK):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
                self._refuse(name, f"is damaged ({error})")

    def _refuse(self, part: str, what: str) -> NoReturn:
        message = (
            f"{self._origin}: the part {part!r} {what}. "
            "Copy the file again, or write it again with torch.export.save."
        )
        raise CaptureError(message)


def check_payloads(parts: ArchiveParts, origin: str, *, trust_pickle: bool) -> None:
    """Check weights and constants against what they claim to be; example inputs are never read.

    Tensors stored as bytes must be as large as declared. Everything that torch would unpickle
    must load with `weights_only=True`, unless `trust_pickle`.

    Raises:
        CaptureError: naming the part.
    """
    for name in parts.names():
        if name.endswith(".pt") and not name.startswith(("extra/", SAMPLES)):
            check_pickle(parts.read(name), name, origin, trust_pickle=trust_pickle)
    for kind in ("weights", "constants"):
        table = f"data/{kind}/model_{kind}_config.json"
        if f"data/{kind}/model.pt" in parts:
            continue
        document = parts.read_json(table)
        config = document.get("config") if isinstance(document, dict) else None
        if not isinstance(config, dict):
            message = f"{origin}: {table} holds no 'config' object. Export the model again."
            raise CaptureError(message)
        for tensor_name, entry in config.items():
            _check_payload(parts, kind, tensor_name, entry, origin, trust_pickle=trust_pickle)


def _check_payload(
    parts: ArchiveParts,
    kind: str,
    tensor_name: str,
    entry: Any,
    origin: str,
    *,
    trust_pickle: bool,
) -> None:
    try:
        path, pickled = entry["path_name"], entry["use_pickle"]
        part = f"data/{kind}/{path}"
        plain = isinstance(path, str) and _PAYLOAD.fullmatch(path) is not None
    except (TypeError, KeyError) as error:
        message = f"{origin}: the entry of {tensor_name!r} in data/{kind} lacks {error}."
        raise CaptureError(message) from None
    where = f"{part} ({tensor_name})"
    if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", tensor_name, re.ASCII):
        message = f"{origin}: {where}: expected a dotted parameter name. The archive is refused."
        raise CaptureError(message)
    if not plain:
        if not trust_pickle:
            message = (
                f"{origin}: {where} is a custom object, which is rebuilt by running code. Export "
                "the model without script objects, or pass --trust-pickle if you trust its author."
            )
            raise CaptureError(message)
        return
    if pickled:
        check_pickle(parts.read(part), where, origin, trust_pickle=trust_pickle)
        return
    try:
        _check_extent(entry["tensor_meta"], parts.size(part))
    except (TypeError, KeyError, ValueError) as error:
        message = (
            f"{origin}: {where}: {error}. The archive is damaged, or was exported under a fake "
            "tensor mode without its weights, or not on the CPU; export it again."
        )
        raise CaptureError(message) from None


def _check_extent(meta: Mapping[str, Any], size: int) -> None:
    """Shape, strides and offset must stay inside the stored bytes (`size`)."""
    if meta["device"]["type"] != "cpu":
        message = f"expected a tensor on the CPU, found device {meta['device']['type']!r}"
        raise ValueError(message)
    itemsize = deserialize_scalar_type(ScalarType(meta["dtype"])).itemsize
    shape = [dimension["as_int"] for dimension in meta["sizes"]]
    strides = [stride["as_int"] for stride in meta["strides"]]
    offset = meta["storage_offset"]["as_int"]
    numbers = [*shape, *strides, offset]
    if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
        message = f"shape {shape}, strides {strides}, offset {offset} are not valid"
        raise ValueError(message)
    if 0 in shape:
        return
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    needed, claimed = (last + 1) * itemsize, math.prod(shape) * itemsize
    if needed > size or claimed > max(size, _EXPANDED):
        message = f"shape {shape} needs {max(needed, claimed)} bytes, found {size}"
        raise ValueError(message)


def check_pickle(data: bytes | IO[bytes], part: str, origin: str, *, trust_pickle: bool) -> None:
    """Refuse a pickled part that is more than tensors and plain containers.

    Raises:
        CaptureError: naming the part, where `torch.load(weights_only=True)` refuses it.
    """
    if trust_pickle or data == b"":
        return
    try:
        torch.load(
            io.BytesIO(data) if isinstance(data, bytes) else data,
            weights_only=True,
            map_location="cpu",
        )
    except Exception as error:  # whatever fails here must not reach the loader
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        message = (
            f"{origin}: the part {part} is a pickle that is not only tensors and could run code "
            f"({reason}). Export the model with plain tensor inputs and weights, or pass "
            "--trust-pickle if you trust its author."
        )
        raise CaptureError(message) from None
