"""Where a training stands: the step, the curves, the best values so far, and all that resumes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fptq_compiler.optimize.ranks import copy_from_first_rank, from_first_rank
from fptq_compiler.optimize.trainable import Group

if TYPE_CHECKING:
    from fptq_compiler.optimize.training import Keeper

logger = logging.getLogger(__name__)
KEEP_EVERY = 10  # steps


@dataclass
class TrainingState:
    """One training.

    Attributes:
        step: how many are done.
        losses: of every step, on its batch.
        held_out: by step, the loss on held-out text before it.
        seconds: of every step of this process, without the looks at held-out text.
    """

    groups: Sequence[Group]
    optimizer: torch.optim.Optimizer
    keeper: Keeper
    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _whole: bool = True

    @classmethod
    def start(
        cls, groups: Sequence[Group], optimizer: torch.optim.Optimizer, keeper: Keeper
    ) -> TrainingState:
        """A new state, or the one that was kept."""
        state = cls(groups, optimizer, keeper)
        copy_from_first_rank(state.values)
        kept = from_first_rank(keeper.load())
        if kept is None:
            return state
        if kept.get("shapes") != state._shapes:
            logger.warning("the kept training has other parameters; training again")
            return state
        state._restore(kept)
        logger.info("training goes on from step %d", state.step)
        return state

    @property
    def values(self) -> list[Tensor]:
        """What is trained, in the order of the groups."""
        return [p.detach() for group in self.groups for p in group.parameters.values()]

    @property
    def best_step(self) -> int:
        """The step before which the held-out loss was least."""
        return min(self.held_out, key=self.held_out.__getitem__)

    def judge(self, held_out: float) -> None:
        """Note the held-out loss of what the values are now; keep them if none was better.

        After an interruption the loss of a step may come again; it is the same.
        """
        if held_out < min(self.held_out.values(), default=math.inf):
            self.best = [value.clone() for value in self.values]
        self.held_out[self.step] = held_out

    def is_stale(self, patience: int) -> bool:
        """Whether the last `patience` looks found nothing better; never for 0."""
        looks = list(self.held_out.values())
        return 0 < patience < len(looks) and min(looks[-patience:]) >= min(looks[:-patience])

    def advance(self, loss: float) -> None:
        """Take one step along the gradients; every KEEP_EVERY the state is kept."""
        self._whole = False
        self.optimizer.step()
        self.losses.append(loss)
        self.step += 1
        self._whole = True
        if self.step % KEEP_EVERY == 0:
            self.keeper.save(self._record())

    @contextmanager
    def kept_at_the_end(self) -> Iterator[None]:
        """Keep the state of the last whole step, whatever ends what is inside."""
        try:
            yield
        finally:
            if self._whole:
                self.keeper.save(self._record())

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best values back."""
        for value, best in zip(self.values, self.best, strict=True):
            value.copy_(best)

    def words(self) -> str:
        """The last losses, for a progress bar."""
        least = min(self.held_out.values())
        return f"loss {self.losses[-1]:.4f}, held out {least:.4f}"

    @property
    def _shapes(self) -> dict[str, list[int]]:
        return {
            f"{group.name}: {name}": list(parameter.shape)
            for group in self.groups for name, parameter in group.parameters.items()
        }

    def _record(self) -> dict[str, Any]:
        return {
            "shapes": self._shapes,
            "step": self.step,
            "losses": self.losses,
            "held_out": self.held_out,
            "values": self.values,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def _restore(self, record: dict[str, Any]) -> None:
        for value, kept in zip(self.values, record["values"], strict=True):
            value.copy_(kept)
        self.optimizer.load_state_dict(record["optimizer"])
        self.step, self.losses = record["step"], record["losses"]
        self.held_out, self.best = record["held_out"], record["best"]
