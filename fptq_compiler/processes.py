"""Several processes of one compilation, as `torchrun` starts them: they join, and fail together.

Every rank runs the stages before the training, which give the same on each: the wait would be as
long, and no program has to travel. Then they share the training, and rank 0 goes on alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fptq_compiler.errors import FptqError, RankError, RecipeError
from fptq_compiler.recipe import Recipe

PATIENCE: Final = timedelta(minutes=30)
"""How long a rank waits for another that is slower, or no longer there."""

_FAILURES, _EXIT_CODE, _FAILED = "failures", "exit code", "failed rank"


def process_count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this is; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def device_of_process(device: str) -> str:
    """The GPU of this process among those of its machine, or the CPU."""
    if device != "cuda" or process_count() == 1:
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def check_shares(recipe: Recipe) -> None:
    """Refuse what the processes cannot share, before anything runs.

    Raises:
        RecipeError: with the numbers.
    """
    batch, count = recipe.training.batch, process_count()
    if recipe.training.sharded and count == 1:
        message = (
            "training.sharded is true, but there is one process: start several by torchrun "
            "--nproc-per-node=N -m fptq_compiler, or leave it out"
        )
        raise RecipeError(message)
    if recipe.trains and batch % count:
        message = (
            f"training.batch is {batch}, which {count} processes cannot share: give a multiple "
            f"of {count} by [training] batch, or start torchrun with another --nproc-per-node"
        )
        raise RecipeError(message)


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are a process group; without it, nothing is.

    The first that fails leaves its exit code to the others.

    Args:
        device: as `device_of_process` gives it; on GPUs they talk by NCCL, else by Gloo.

    Raises:
        RankError: another process failed; it has that one's exit code.
    """
    if process_count() == 1:
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    store.set_timeout(PATIENCE)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("group", store), rank=rank, world_size=count, timeout=PATIENCE,
    )
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        _fail_together(store, rank, error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail_together(store: Store, rank: int, error: BaseException) -> None:
    """Note the first failure; raise that of another process in place of what followed from it."""
    try:
        if store.add(_FAILURES, 1) == 1:
            store.set(_FAILED, str(rank))
            store.set(_EXIT_CODE, str(_exit_code(error)))
            return
        failed, code = store.get(_FAILED).decode(), int(store.get(_EXIT_CODE))
    except RuntimeError:  # the process that held the store is gone
        return
    message = f"rank {rank} ends because rank {failed} failed, which said why"
    raise RankError(message, code) from error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, FptqError) else 1
