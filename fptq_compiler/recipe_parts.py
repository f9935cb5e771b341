"""The parts of a recipe: one frozen record per stage, each checking its own values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Final

from fptq_compiler.closed_config import (
    check_at_least,
    check_one_of,
    nearest,
    read_names,
    spelled,
)
from fptq_compiler.errors import RecipeError

TRANSFORMS: Final = ("residual", "prerope", "value", "updown", "hadamard", "scaling")
"""The six transforms of FPTQuant: T_r, T_k, T_v, T_u, T_d, S_n."""

NEIGHBOURS: Final = ("smooth", "heads", "keys", "kronecker")
"""What other methods insert, never by "auto": SmoothQuant's scale between norms and linears;
QuaRot's Hadamards across the heads in front of o_proj, and of queries and keys behind RoPE;
FlatQuant's Kronecker products in front of linears."""

VALUE_MAPS: Final = ("affine", "rotation", "hadamard")

SCALING_PLACES: Final = ("down_proj", "o_proj")
"""Where S_n may multiply: at the input of the linear that writes into the residual."""

LONGEST_CACHE: Final = 8192
"""Of a model that says a longer context or none: its tables of angles stand in the file."""

SHORTEST_CACHE: Final = 32
"""The tokens that the written file is compared on with the program."""

CACHE_SCALES: Final = ("auto", "per-tensor", "per-channel")
WIDTHS: Final = (4, 8, 16)
BLOCKS: Final = (0, 32, 64, 128)
HADAMARD_BLOCKS: Final = (0, 16, 32, 64, 128, 256, 512)
ACCURACY_LEVELS: Final = (1, 4)
ROUNDINGS: Final = ("auto", "nearest", "gptq")
SINKS: Final = ("first-position", "none")
OBJECTIVES: Final = ("auto", "weights", "activations")


@dataclass(frozen=True)
class Bits:
    """How many bits weights, activations and the KV cache get; 16 means not quantised."""

    weights: int = 4
    activations: int = 8
    cache: int = 8

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_one_of(f"bits: {entry.name}", getattr(self, entry.name), WIDTHS)

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Reads `W-A-KV`, for example `4-8-8`.

        Raises:
            RecipeError: it is not three of 4, 8 and 16 with hyphens between.
        """
        if not re.fullmatch(r"(4|8|16)-(4|8|16)-(4|8|16)", text):
            message = (
                f"bits are {text!r}, expected W-A-KV (weights, activations, KV cache), each "
                "4, 8 or 16, for example 4-8-8"
            )
            raise RecipeError(message)
        return cls(*(int(part) for part in text.split("-")))

    def __str__(self) -> str:
        return f"{self.weights}-{self.activations}-{self.cache}"


def read_bits(name: str, value: object) -> Bits:
    """Reads the TOML form of the bits, a string."""
    if not isinstance(value, str):
        message = f"{name} is {value!r}, expected a string such as '4-8-8'"
        raise RecipeError(message)
    return Bits.parse(value)


def read_transforms(name: str, value: object) -> tuple[str, ...] | None:
    """Reads the TOML form of the transforms: "auto", "none" or a list of names."""
    if value in ("auto", "none"):
        return None if value == "auto" else ()
    if isinstance(value, str):
        message = f"{name} is {value!r}, expected 'auto', 'none' or a list of names"
        raise RecipeError(message)
    return read_names(name, value)


def _write_transforms(names: tuple[str, ...] | None) -> object:
    """Writes what `read_transforms` reads."""
    return "auto" if names is None else names or "none"


def read_block(name: str, value: object) -> int | None:
    """Reads the TOML form of the Hadamard's block: "auto" or a number of channels."""
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        message = f"{name} is {value!r}, expected 'auto' or a whole number"
        raise RecipeError(message)
    return value


def _write_block(block: int | None) -> object:
    """Writes what `read_block` reads."""
    return "auto" if block is None else block


@dataclass(frozen=True)
class TransformsRecipe:
    """Which transforms are inserted, and how.

    Attributes:
        names: the transforms demanded; None is "auto" (every one that applies), () is none.
        where_possible: a transform without a site is reported, not an error.
        scaling_places: linears whose input S_n multiplies; elsewhere it multiplies the output.
            On SmolLM2 the input of o_proj is calmer without it.
        residual_learned: train T_r; otherwise it stays the Hadamard it starts from.
        value_map: what T_v may become from the Hadamard it starts from: any invertible map, a
            rotation, or nothing else.
        smooth_alpha: how much of the outliers moves from the activations into the weights.
        hadamard_block: channels that T_d mixes with each other, at run time one matmul with a
            matrix of that order; 0 mixes all, which costs two matmuls and a transpose. A width
            that it does not divide is mixed whole. None is "auto": 0 for 4-bit activations,
            which need it, else 32.
        choose: keep only what lowers the loss on held-out text, tried one by one, then site by
            site; it takes a compilation a transform.
        left_out: as `transform.site`, for example "updown.model.layers.3.mlp": where one that
            applies is not inserted. `choose` fills it in.
        trial_steps: of end-to-end training, in each trial.
    """

    names: tuple[str, ...] | None = field(
        default=None, metadata=spelled(read_transforms, _write_transforms)
    )
    where_possible: bool = True
    scaling_places: tuple[str, ...] = ("down_proj",)
    residual_learned: bool = True
    value_map: str = "affine"
    smooth_alpha: float = 0.85
    hadamard_block: int | None = field(
        default=None, metadata=spelled(read_block, _write_block)
    )
    choose: bool = False
    left_out: tuple[str, ...] = ()
    trial_steps: int = 20

    def __post_init__(self) -> None:
        check_at_least("transforms.trial_steps", self.trial_steps, 1)
        if self.hadamard_block is not None:
            check_one_of("transforms.hadamard_block", self.hadamard_block, HADAMARD_BLOCKS)
        check_one_of("transforms.value_map", self.value_map, VALUE_MAPS)
        if not 0.0 <= self.smooth_alpha <= 1.0:
            message = f"transforms.smooth_alpha is {self.smooth_alpha!r}, expected 0 to 1"
            raise RecipeError(message)
        known = (*TRANSFORMS, *NEIGHBOURS)
        for name in self.names or ():
            if name not in known:
                message = f"unknown transform {name!r}: {nearest(name, known)}"
                raise RecipeError(message)
        for name in self.left_out:
            if name.partition(".")[0] not in known or "." not in name:
                message = (
                    f"transforms.left_out has {name!r}, expected a transform, a point and a site, "
                    'as in "updown.model.layers.3.mlp"'
                )
                raise RecipeError(message)
        if self.names is None and not self.where_possible:
            message = (
                "transforms: 'auto' takes each transform where it applies and contradicts "
                "where_possible = false; demand transforms by name instead"
            )
            raise RecipeError(message)
        for place in self.scaling_places:
            check_one_of("transforms.scaling_places", place, SCALING_PLACES)
        if self.names is not None:
            in_order = tuple(name for name in known if name in self.names)
            object.__setattr__(self, "names", in_order)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The transforms to look for."""
        return TRANSFORMS if self.names is None else self.names


@dataclass(frozen=True)
class WeightsRecipe:
    """How weights are rounded.

    Attributes:
        block: input channels that share a scale; 0 is per output channel.
        p: power of the norm |w - ŵ|^p that the clip search minimises.
        embedding_bits: of the embedding table, a scale per row.
        head_bits: of the head, a scale per output channel.
        matmulnbits_accuracy_level: ONNX Runtime's, of linears whose activations are not
            quantised: 1 is float, 4 quantises activations to INT8 on the fly, which is faster
            and no longer weight-only.
        bias_correction: give every linear the bias that keeps its mean output.
        rounding: to the "nearest" code, or by "gptq", which rounds each input channel so that it
            makes up for those before it on the calibration inputs; of linears, and of the head
            where it has 4 bits. Training keeps GPTQ's codes, and then trains no transforms.
            "auto" is "gptq" for 4-bit weights behind activations of 8 bits or more, unless
            weights are trained too; at 4-bit activations it is worse.
    """

    block: int = 0
    p: float = 2.0
    embedding_bits: int = 8
    head_bits: int = 8
    matmulnbits_accuracy_level: int = 1
    bias_correction: bool = True
    rounding: str = "auto"

    def __post_init__(self) -> None:
        check_one_of("weights.block", self.block, BLOCKS)
        check_at_least("weights.p", self.p, 1.0)
        check_one_of("weights.embedding_bits", self.embedding_bits, WIDTHS)
        check_one_of("weights.head_bits", self.head_bits, WIDTHS)
        check_one_of(
            "weights.matmulnbits_accuracy_level", self.matmulnbits_accuracy_level, ACCURACY_LEVELS
        )
        check_one_of("weights.rounding", self.rounding, ROUNDINGS)


@dataclass(frozen=True)
class ActivationsRecipe:
    """How activation ranges are set.

    Attributes:
        p: power of the norm |x - x̂|^p that the clip search minimises.
        sinks: "first-position" leaves the massive activations of the first token out of the
            range search, "none" searches over every position alike.
    """

    p: float = 2.0
    sinks: str = "first-position"

    def __post_init__(self) -> None:
        check_at_least("activations.p", self.p, 1.0)
        check_one_of("activations.sinks", self.sinks, SINKS)


@dataclass(frozen=True)
class LocalRecipe:
    """Stage one: the optimisation of the transforms, without an end-to-end loss.

    Attributes:
        steps: AdamW steps; 0 leaves the transforms at their start.
        learning_rate: of AdamW.
        p: power of the norm of the transformed tensors that is minimised.
        objective: "weights" (data-free), "activations" (weights and calibration batches), or
            "auto": the second where there are calibration tokens.
    """

    steps: int = 100
    learning_rate: float = 1e-2
    p: float = 4.0
    objective: str = "auto"

    def __post_init__(self) -> None:
        check_at_least("local.steps", self.steps, 0)
        if not 0.0 < self.learning_rate < float("inf"):
            message = f"local.learning_rate is {self.learning_rate!r}, expected a positive number"
            raise RecipeError(message)
        check_at_least("local.p", self.p, 1.0)
        check_one_of("local.objective", self.objective, OBJECTIVES)


@dataclass(frozen=True)
class CacheRecipe:
    """The KV cache of the written file.

    Attributes:
        enabled: past keys and values are inputs, present ones outputs.
        max_length: tokens that a sequence may have, past included, at least SHORTEST_CACHE; 0
            takes the model's context, at most LONGEST_CACHE.
        scales: of a quantised cache: "per-tensor" is one for the keys and one for the values of
            a layer, "per-channel" one for each of their heads and channels; "auto" is the second
            for 4 bits, where it is worth most.
    """

    enabled: bool = False
    max_length: int = 0
    scales: str = "auto"

    def __post_init__(self) -> None:
        if self.max_length:
            check_at_least("cache.max_length", self.max_length, SHORTEST_CACHE)
        check_one_of("cache.scales", self.scales, CACHE_SCALES)
        if self.max_length and not self.enabled:
            message = (
                f"cache.max_length is {self.max_length}, but the file has no cache to hold so "
                "many tokens; ask for one with --kv-cache (cache.enabled)"
            )
            raise RecipeError(message)
        if self.scales != "auto" and not self.enabled:
            message = (
                f"cache.scales is {self.scales!r}, but the file has no cache to have them; ask "
                "for one with --kv-cache (cache.enabled)"
            )
            raise RecipeError(message)


@dataclass(frozen=True)
class CalibrationRecipe:
    """How much calibration data is taken: `samples` sequences of `length` tokens."""

    samples: int = 8
    length: int = 256

    def __post_init__(self) -> None:
        check_at_least("calibration.samples", self.samples, 1)
        check_at_least("calibration.length", self.length, 2)
