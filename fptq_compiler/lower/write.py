"""Write the file whole or not at all: a temporary folder beside the output, then a move."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from fptq_compiler.errors import LoweringError
from fptq_compiler.runtime.session_file import session_path

EXTERNAL_ABOVE = 400_000_000  # one file is made in memory, as a whole and twice


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A folder beside the output that is gone afterwards, whatever happens.

    Raises:
        LoweringError: the output's folder does not exist or cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        message = (
            f"cannot write to {output.parent}: {error.strerror}; expected an existing folder "
            "with write permission and free space"
        )
        raise LoweringError(message) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(
    model: ir.Model,
    path: Path,
    metadata: Mapping[str, str],
    ir_version: int,
    external_above: int = EXTERNAL_ABOVE,
) -> None:
    """Write a model with its metadata, weights beside it where it is too large for one file.

    Raises:
        LoweringError: the folder is full, or the ONNX checker finds the model malformed.
    """
    model.ir_version = ir_version
    model.producer_name = "fptq-compiler"
    model.metadata_props.update(metadata)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    size = sum(t.nbytes for t in tensors if t is not None)
    try:
        if size > external_above:
            ir.save(model, path, external_data=f"{path.name}.data")
        else:
            ir.save(model, path)
    except OSError as error:
        message = f"cannot write {path.name} ({size / 1e6:.0f} MB): {error.strerror}"
        raise LoweringError(message) from error
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        message = f"the ONNX checker refuses the model: {error}"
        raise LoweringError(message) from error


def publish(staged: Path, output: Path) -> int:
    """Move the finished file, and what belongs to it, to the output; gives the weights' bytes.

    Data and session file go first, so that a model never stands without them.
    """
    data = staged.with_name(f"{staged.name}.data")
    try:
        settings = session_path(staged)
        beside = [(f, output.with_name(f.name)) for f in (data, settings)]
        for source, target in (*beside, (staged, output)):
            if source.exists():
                source.replace(target)
            elif source is not staged:
                target.unlink(missing_ok=True)  # of the model that is being replaced
    except OSError as error:
        message = f"cannot move the finished file to {output}: {error.strerror}"
        raise LoweringError(message) from error
    return sum(p.stat().st_size for p in (output, beside[0][1]) if p.exists())
