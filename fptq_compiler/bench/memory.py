"""Resident memory of one model's session, measured in a process of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from fptq_compiler.bench.model import open_model
from fptq_compiler.bench.result import Memory, Settings
from fptq_compiler.errors import RuntimeLoadError
from fptq_compiler.runtime.model_file import ModelFile

_STATUS: Final = Path("/proc/self/status")
_KIB: Final = 1024


def measure_memory(file: ModelFile, settings: Settings) -> Memory | None:
    """Opens a model and runs one decode step in a new process.

    The step is that of the longest context, and without a cache a prefill of one token.

    Returns:
        What the session holds and the most it held; None where /proc does not say.

    Raises:
        RuntimeLoadError: the process was ended, or the model cannot be opened there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(memory_of_session, file, settings).result()
        except BrokenProcessPool as error:
            message = (
                f"{file.path}: the process that measures its memory was ended from outside; is "
                "there enough memory for the model?"
            )
            raise RuntimeLoadError(message) from error


def memory_of_session(file: ModelFile, settings: Settings) -> Memory | None:
    """Does the work of the new process, which by now has imported all that it needs.

    The high-water mark of /proc is the process's own; that of getrusage would begin with the
    memory of the process that started it.
    """
    before = resident_bytes("VmRSS")
    model = open_model(file, settings.provider, settings.threads)
    past = max(settings.decode_at) if model.has_cache else 0
    step = model.step(settings.batch, tokens=1, past=past)
    step()
    held, peak = resident_bytes("VmRSS"), resident_bytes("VmHWM")
    if before is None or held is None or peak is None:
        return None
    return Memory(held - before, peak - before)


def resident_bytes(name: str) -> int | None:
    """Gives VmRSS (now) or VmHWM (the most so far), or None where /proc does not say."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0]) * _KIB if sizes else None
