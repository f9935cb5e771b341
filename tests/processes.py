"""Two processes as torchrun starts them, and how they end together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from fptq_compiler.errors import OptimizationError, RankError
from fptq_compiler.optimize.ranks import mean_over_ranks, rank
from fptq_compiler.processes import joined

SECONDS = 600  # for a slow machine


def fail(folder: Path) -> None:
    """Rank 1 meets an error where rank 0 waits for it."""
    code = _exit_code(lambda: _raise(OptimizationError("not finite")))
    (folder / f"failed{os.environ['RANK']}").write_text(code)


def die(folder: Path) -> None:
    """Rank 1 is killed where rank 0 waits for it."""
    code = _exit_code(lambda: os._exit(9))
    (folder / f"died{os.environ['RANK']}").write_text(code)


def _exit_code(action: Callable[[], object]) -> str:
    try:
        with joined("cpu"):
            mean_over_ranks(torch.ones(()))
            if rank() == 1:
                action()
            mean_over_ranks(torch.ones(()))
    except (OptimizationError, RankError) as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return "nothing was raised"


def _raise(error: Exception) -> None:
    raise error


def two_ranks(work: Callable[[Path], None], folder: Path) -> list[int | None]:
    """Run two processes as torchrun does; gives their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    processes = [context.Process(target=_as_rank, args=(work, folder, r, port)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _as_rank(work: Callable[[Path], None], folder: Path, number: int, port: int) -> None:
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    work(folder)
