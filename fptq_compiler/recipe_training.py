"""The recipes of the stages that train: what, towards what, for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fptq_compiler.closed_config import check_at_least, check_one_of, spelled
from fptq_compiler.errors import RecipeError

OBJECTIVES: Final = ("jensen-shannon", "forward-kl", "top-k-kl", "hidden-mse")
COMPUTE_TYPES: Final = ("auto", "float32", "bfloat16")
WEIGHT_CORRECTIONS: Final = ("none", "lora", "full")
BLOCK_INPUTS: Final = ("quantised", "original")


def read_rate(name: str, value: object) -> float | None:
    """Reads the TOML form of a rate: "auto" or a number."""
    if value == "auto":
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        message = f"{name} is {value!r}, expected 'auto' or a number"
        raise RecipeError(message)
    return float(value)


def _write_rate(rate: float | None) -> object:
    """Writes what `read_rate` reads."""
    return "auto" if rate is None else rate


@dataclass(frozen=True)
class TrainingRecipe:
    """Stage two: the quantised program learns the original's next-token distributions.

    Attributes:
        steps: optimiser steps; 0 leaves the stage out.
        batch: sequences a step, over all processes.
        length: tokens of a sequence.
        objective: what is minimised, the mean over tokens.
        top_k: of "top-k-kl", the teacher's likeliest tokens that count.
        remember_teacher: of "top-k-kl", keep what the original says of each sequence, 8 top_k
            bytes a token: for a text that is read more than once.
        transforms_rate, matrices_rate, weights_rate, activations_rate, zero_points_rate: learning
            rates of the maps of channels and pairs, of those that are matrices (T_v, T_r), of the
            logarithms of weight and activation scales, and of zero-points in codes. None is
            "auto": matrices turn values for the cache's codes, and learn faster where it has 4
            bits.
        warmup: share of the steps in which the rates rise; then they fall as a cosine.
        clip: the largest norm of all gradients together.
        weights: "lora" or "full" also trains a correction of every linear's weight, merged into
            it before it is rounded.
        rank: of "lora".
        correction_rate: learning rate of the correction.
        held_out: sequences that are not trained on, but choose the best state.
        evaluate_every: steps from one look at them to the next.
        patience: looks without a better state before the stage ends early; 0 is never.
        compute: what linear layers multiply in; "auto" is bfloat16 where it is faster.
        residual: train T_r too, which multiplies every weight by it at every step.
        checkpointing: keep one activation a block, and compute the others twice.
        sharded: of several processes each holds a part of the frozen weights.
    """

    steps: int = 150
    batch: int = 2
    length: int = 256
    objective: str = "jensen-shannon"
    top_k: int = 256
    remember_teacher: bool = False
    transforms_rate: float = 3e-3
    matrices_rate: float | None = field(
        default=None, metadata=spelled(read_rate, _write_rate)
    )
    weights_rate: float = 3e-3
    activations_rate: float = 3e-3
    zero_points_rate: float = 2e-2
    warmup: float = 0.1
    clip: float = 1.0
    weights: str = "none"
    rank: int = 16
    correction_rate: float = 1e-4
    held_out: int = 8
    evaluate_every: int = 20
    patience: int = 0
    compute: str = "auto"
    residual: bool = False
    checkpointing: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        check_one_of("training.objective", self.objective, OBJECTIVES)
        check_one_of("training.compute", self.compute, COMPUTE_TYPES)
        check_one_of("training.weights", self.weights, WEIGHT_CORRECTIONS)
        for name in ("steps", "patience"):
            check_at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("batch", "top_k", "rank", "held_out", "evaluate_every"):
            check_at_least(f"training.{name}", getattr(self, name), 1)
        check_at_least("training.length", self.length, 2)
        if self.remember_teacher and (self.objective != "top-k-kl" or self.sharded):
            message = (
                f'training.remember_teacher with objective "{self.objective}" and sharded = '
                f'{str(self.sharded).lower()}: it needs "top-k-kl", of which little has to be '
                "kept, and a teacher that every process has"
            )
            raise RecipeError(message)
        rates = ("transforms", "matrices", "weights", "activations", "zero_points", "correction")
        for name in (*(f"{rate}_rate" for rate in rates), "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                message = f"training.{name} is {value!r}, expected 0 or more"
                raise RecipeError(message)
        if not 0.0 <= self.warmup < 1.0:
            message = f"training.warmup is {self.warmup!r}, expected a share from 0 to below 1"
            raise RecipeError(message)


@dataclass(frozen=True)
class BlockwiseRecipe:
    """Before stage two, block by block: each learns the output that it has in the float program.

    Batches, schedule and what is trained are those of `[training]`, without T_r, which turns all
    blocks.

    Attributes:
        steps: optimiser steps of each block; 0 leaves the stage out.
        rate: times the learning rates of `[training]`.
        inputs: what a block is trained on: "quantised" is what the blocks in front of it give,
            "original" what they give in float.
    """

    steps: int = 0
    rate: float = 1.0
    inputs: str = "quantised"

    def __post_init__(self) -> None:
        check_at_least("blockwise.steps", self.steps, 0)
        check_one_of("blockwise.inputs", self.inputs, BLOCK_INPUTS)
        if not 0.0 < self.rate < float("inf"):
            message = f"blockwise.rate is {self.rate!r}, expected a positive number"
            raise RecipeError(message)
