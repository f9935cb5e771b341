"""Recipes: the closed, immutable configuration of one compilation.

A recipe says everything that changes the written file; where files lie and how much is
printed are options of the command line instead. Recipes are TOML. A key or a name that does
not exist is a `RecipeError` that names the nearest one that does, and a value of the wrong
type or range says what was expected, so that a misspelt setting never passes in silence.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fptq_compiler.closed_config import (
    check_at_least,
    check_one_of,
    nearest,
    read_record,
    spelled,
    write_record,
)
from fptq_compiler.errors import RecipeError
from fptq_compiler.recipe_parts import (
    CACHE_SCALES,
    NEIGHBOURS,
    ROUNDINGS,
    TRANSFORMS,
    ActivationsRecipe,
    Bits,
    CacheRecipe,
    CalibrationRecipe,
    LocalRecipe,
    TransformsRecipe,
    WeightsRecipe,
    read_bits,
    read_transforms,
)
from fptq_compiler.recipe_training import BlockwiseRecipe, TrainingRecipe

__all__ = [
    "BUILT_IN",
    "CACHE_SCALES",
    "DEFAULT_RECIPE",
    "DTYPES",
    "NEIGHBOURS",
    "ROUNDINGS",
    "TARGETS",
    "TRANSFORMS",
    "VERIFY_LEVELS",
    "ActivationsRecipe",
    "Bits",
    "BlockwiseRecipe",
    "CacheRecipe",
    "CalibrationRecipe",
    "LocalRecipe",
    "Recipe",
    "TrainingRecipe",
    "TransformsRecipe",
    "WeightsRecipe",
    "load_recipe",
]

TARGETS: Final = ("qdq", "ort-cpu", "ort-cuda", "tensorrt")
DTYPES: Final = ("auto", "float32", "float16", "bfloat16")
VERIFY_LEVELS: Final = ("off", "probe", "full")
DEFAULT_RECIPE: Final = "fptquant"


@dataclass(frozen=True)
class Recipe:
    """Everything that changes the written file.

    `dtype` is what the file computes in where it does not in integers; "auto" is the target's.
    """

    name: str = DEFAULT_RECIPE
    bits: Bits = field(default_factory=Bits, metadata=spelled(read_bits, str))
    transforms: TransformsRecipe = field(default_factory=TransformsRecipe)
    weights: WeightsRecipe = field(default_factory=WeightsRecipe)
    activations: ActivationsRecipe = field(default_factory=ActivationsRecipe)
    local: LocalRecipe = field(default_factory=LocalRecipe)
    blockwise: BlockwiseRecipe = field(default_factory=BlockwiseRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    cache: CacheRecipe = field(default_factory=CacheRecipe)
    target: str = "qdq"
    dtype: str = "auto"
    verify: str = "probe"
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("target", self.target, TARGETS)
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("verify", self.verify, VERIFY_LEVELS)
        check_at_least("seed", self.seed, 0)
        if self.cache.scales != "auto" and self.bits.cache == 16:
            message = (
                f"cache.scales is {self.cache.scales!r}, but at {self.bits} the cache is float "
                "and has none; leave it out, or quantise the cache"
            )
            raise RecipeError(message)
        if self.weights.matmulnbits_accuracy_level == 4 and not self.weight_only:
            message = (
                f"weights.matmulnbits_accuracy_level is 4, but at {self.bits} no linear runs in "
                "MatMulNBits; it is for weights alone, for example 4-16-16"
            )
            raise RecipeError(message)

    @property
    def weight_only(self) -> bool:
        """Whether linears read codes of weights, but no codes of activations."""
        coded = 4 in (self.bits.weights, self.head_bits) or self.weights.block > 0
        return coded and self.bits.weights != 16 and self.bits.activations == 16

    @property
    def trains(self) -> bool:
        """Whether a stage trains on text: steps, and something that is quantised."""
        quantised = {self.bits.weights, self.bits.activations, self.bits.cache} != {16}
        return quantised and (self.training.steps > 0 or self.blockwise.steps > 0)

    @property
    def rounds_by_gptq(self) -> bool:
        """Whether GPTQ rounds the weights of linears."""
        if self.weights.rounding == "auto":
            moves_codes = self.trains and self.training.weights != "none"
            return self.bits.weights == 4 and self.bits.activations >= 8 and not moves_codes
        return self.bits.weights != 16 and self.weights.rounding == "gptq"

    @property
    def embedding_bits(self) -> int:
        """Bits of the embedding: 16 where the weights are not quantised at all."""
        return 16 if self.bits.weights == 16 else self.weights.embedding_bits

    @property
    def head_bits(self) -> int:
        """Bits of the head: 16 where the weights are not quantised at all."""
        return 16 if self.bits.weights == 16 else self.weights.head_bits

    @property
    def channel_scales(self) -> bool:
        """Whether every head and channel of the cache has a scale of its own."""
        scales = self.cache.scales
        by_itself = self.cache.enabled and self.bits.cache == 4
        return scales == "per-channel" or (scales == "auto" and by_itself)

    @property
    def hadamard_block(self) -> int:
        """Channels that T_d mixes with each other; 0 is all."""
        if self.transforms.hadamard_block is not None:
            return self.transforms.hadamard_block
        return 0 if self.bits.activations == 4 else 32

    @property
    def matrices_rate(self) -> float:
        """Learning rate of T_v, and of T_r where it is trained end to end."""
        if self.training.matrices_rate is not None:
            return self.training.matrices_rate
        return 1.5e-3 if self.bits.cache == 4 else 5e-4

    def override(
        self,
        *,
        bits: str | None = None,
        transforms: str | None = None,
        samples: int | None = None,
        sequence_length: int | None = None,
        target: str | None = None,
        dtype: str | None = None,
        verify: str | None = None,
        seed: int | None = None,
        kv_cache: bool | None = None,
        max_length: int | None = None,
        embedding_bits: int | None = None,
        head_bits: int | None = None,
        matmulnbits_accuracy_level: int | None = None,
        kv_scales: str | None = None,
        steps: int | None = None,
        choose: bool | None = None,
        rounding: str | None = None,
    ) -> Recipe:
        """Gives the recipe with the command line's flags in it; None leaves a setting alone.

        Args:
            bits: `W-A-KV`.
            transforms: `auto`, `none`, or names with commas between, which are demanded.
            samples: calibration sequences.
            sequence_length: tokens of each.
            target: form of the ONNX file.
            dtype: float type of the ONNX file.
            verify: how much is proved by running it.
            seed: of every random draw.
            kv_cache: whether the file has a cache.
            max_length: tokens that the cache may hold.
            embedding_bits: of the embedding table.
            head_bits: of the head.
            matmulnbits_accuracy_level: 1 or 4, where activations stay in float.
            kv_scales: which values of a quantised cache share a scale.
            steps: of end-to-end training; 0 leaves it out.
            choose: whether transforms are tried, and kept where held-out text says so.
            rounding: of the weights of linears.

        Raises:
            RecipeError: a value does not exist, is out of range, or contradicts another one.
        """
        tables = _given(embedding_bits=embedding_bits, head_bits=head_bits)
        made = replace(
            self,
            **_given(target=target, dtype=dtype, verify=verify, seed=seed),
            bits=self.bits if bits is None else Bits.parse(bits),
            transforms=replace(
                self.transforms if transforms is None else self._transforms(transforms),
                **_given(choose=choose),
            ),
            weights=replace(
                self.weights, **tables,
                **_given(
                    matmulnbits_accuracy_level=matmulnbits_accuracy_level, rounding=rounding
                ),
            ),
            cache=replace(
                self.cache, **_given(enabled=kv_cache, max_length=max_length, scales=kv_scales)
            ),
            training=replace(self.training, **_given(steps=steps)),
            calibration=replace(
                self.calibration, **_given(samples=samples, length=sequence_length)
            ),
        )
        if made.bits.weights == 16 and any(value != 16 for value in tables.values()):
            flags = ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in tables.items())
            message = (
                f"{flags}: at {made.bits} the weights stay in float, and embedding and head "
                "with them; quantise the weights, or leave it out"
            )
            raise RecipeError(message)
        if made.bits.weights == 16 and rounding == "gptq":
            message = (
                f"--rounding gptq: at {made.bits} the weights stay in float; quantise them, or "
                "leave it out"
            )
            raise RecipeError(message)
        return made

    def _transforms(self, flag: str) -> TransformsRecipe:
        """The words of --transforms: `auto`, `none`, or names, which are demanded."""
        words = flag.strip()
        names = words if words in ("auto", "none") else [w.strip() for w in words.split(",")]
        chosen = read_transforms("--transforms", names)
        return replace(self.transforms, names=chosen, where_possible=chosen is None)

    def to_toml(self) -> str:
        """Writes the whole recipe, defaults included; `from_toml` gives an equal one back."""
        return write_record(self)

    @classmethod
    def from_toml(cls, text: str, where: str) -> Recipe:
        """Reads a recipe; what it leaves out has the default value.

        Args:
            text: the TOML.
            where: the file's name, for messages, and the recipe's name where it gives none.

        Raises:
            RecipeError: not TOML, an unknown key, or a value of the wrong type or range.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            message = f"{where}: not valid TOML: {error}"
            raise RecipeError(message) from error
        table.setdefault("name", Path(where).stem)
        transforms = table.get("transforms")
        if isinstance(transforms, dict):
            auto = transforms.get("names", "auto") == "auto"
            transforms.setdefault("where_possible", auto)
        try:
            return read_record(cls, table)
        except RecipeError as error:
            message = f"{where}: {error}"
            raise RecipeError(message) from error


def _given(**flags: Any) -> dict[str, Any]:
    """The flags that were given; None leaves a setting alone."""
    return {key: value for key, value in flags.items() if value is not None}


NEAREST: Final = WeightsRecipe(rounding="nearest")

BUILT_IN: Final[Mapping[str, Recipe]] = {
    "fptquant": Recipe(),
    "fptquant-local": Recipe(name="fptquant-local", training=TrainingRecipe(steps=0)),
    "rtn": Recipe(
        name="rtn",
        weights=NEAREST,
        transforms=TransformsRecipe(names=(), where_possible=False),
        local=LocalRecipe(steps=0),
        training=TrainingRecipe(steps=0),
    ),
    "rtn-trained": Recipe(
        name="rtn-trained",
        weights=NEAREST,
        transforms=TransformsRecipe(names=(), where_possible=False),
        local=LocalRecipe(steps=0),
    ),
    "smoothquant": Recipe(
        name="smoothquant",
        weights=NEAREST,
        transforms=TransformsRecipe(names=("smooth",), where_possible=False),
        local=LocalRecipe(steps=0),
        training=TrainingRecipe(steps=0),
    ),
    "quarot": Recipe(
        name="quarot",
        weights=NEAREST,
        transforms=TransformsRecipe(
            names=("residual", "value", "hadamard", "heads", "keys"), where_possible=False,
            residual_learned=False, value_map="hadamard", hadamard_block=0,
        ),
        local=LocalRecipe(steps=0),
        training=TrainingRecipe(steps=0),
    ),
    "spinquant": Recipe(
        name="spinquant",
        weights=NEAREST,
        transforms=TransformsRecipe(
            names=("residual", "value", "hadamard", "keys"), where_possible=False,
            value_map="rotation", hadamard_block=0,
        ),
    ),
    "flatquant": Recipe(
        name="flatquant",
        weights=NEAREST,
        transforms=TransformsRecipe(
            names=("value", "updown", "smooth", "keys", "kronecker"), where_possible=False,
        ),
        local=LocalRecipe(objective="activations"),
    ),
    "quarot-static": Recipe(
        name="quarot-static",
        weights=NEAREST,
        transforms=TransformsRecipe(
            names=("residual", "value", "hadamard"), where_possible=False,
            residual_learned=False, hadamard_block=0,
        ),
        local=LocalRecipe(steps=0),
        training=TrainingRecipe(steps=0),
    ),
}
"""The recipes that `--recipe NAME` knows."""


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Gives a built-in recipe by its name, or reads one from a TOML file.

    Raises:
        RecipeError: neither a built-in name nor a readable recipe file.
    """
    if isinstance(name_or_path, str) and name_or_path in BUILT_IN:
        return BUILT_IN[name_or_path]
    path = Path(name_or_path)
    named_as_file = path.suffix == ".toml" or len(path.parts) > 1
    if not named_as_file and not path.is_file():
        hint = nearest(str(name_or_path), BUILT_IN)
        message = f"no built-in recipe {str(name_or_path)!r}: {hint} (or give a .toml file)"
        raise RecipeError(message)
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        message = f"{path}: cannot read the recipe: {error.strerror or error}"
        raise RecipeError(message) from error
    except UnicodeDecodeError as error:
        message = f"{path}: cannot read the recipe: it is not UTF-8 text"
        raise RecipeError(message) from error
