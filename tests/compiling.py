"""Compile a toy as a user would, and keep the frozen program beside the written file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fptq_compiler import driver
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.contract import session_options
from fptq_compiler.recipe import (
    Bits,
    CacheRecipe,
    CalibrationRecipe,
    LocalRecipe,
    Recipe,
    TrainingRecipe,
    WeightsRecipe,
)
from fptq_compiler.report import Report
from fptq_compiler.runtime.session_file import FULL_PRECISION
from tests.toys import ToyConfig, export_toy

SMALL = ToyConfig(layers=1, hidden=32, mlp=48, tied=True)
"""One block; 48 is no multiple of 32, so that the last block of a scale is a short one."""
BIASED = replace(SMALL, attention_bias=True, output_bias=True, mlp_bias=True)
QUICK = Recipe(
    local=LocalRecipe(steps=3),
    training=TrainingRecipe(steps=0),
    calibration=CalibrationRecipe(samples=4, length=24),
)


def quick(setting: str, **changes: Any) -> Recipe:
    """A recipe that takes seconds: "W-A-KV", or "W-A-KV/block"."""
    bits, _, block = setting.partition("/")
    weights = WeightsRecipe(block=int(block or 0))
    return replace(QUICK, bits=Bits.parse(bits), weights=weights, **changes)


@dataclass(frozen=True)
class Compiled:
    """One compilation.

    Attributes:
        path: the ONNX file.
        report: what the driver said.
        recipe: what was asked for.
        program: frozen, the reference for the file.
    """

    path: Path
    report: Report
    recipe: Recipe
    program: Program

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path)

    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}


def keeping_program(compile_it: Callable[[], Report], path: Path, recipe: Recipe) -> Compiled:
    """Run a compilation and keep the program that it hands to the lowering."""
    kept: list[Program] = []
    original = driver.lower

    def lower(program: Program, *arguments: Any, **options: Any) -> None:
        kept.append(program)
        original(program, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "lower", lower)
        report = compile_it()
    return Compiled(path, report, recipe, kept[0])


def compile_toy(config: ToyConfig, recipe: Recipe, path: Path, **options: Any) -> Compiled:
    """Compile the toy in Python."""
    chosen = driver.Options(recipe=recipe, **options)
    return keeping_program(
        lambda: driver.compile_model(export_toy(config), path, options=chosen), path, recipe
    )


CACHE_LENGTH = 40
CompileForGpu = Callable[..., Compiled]


def gpu_compiler(config: ToyConfig, target: str, folder: Callable[[str], Path]) -> CompileForGpu:
    """Compile a toy for a target of half precision, each setting once.

    Args:
        config: the toy.
        target: its name.
        folder: makes an empty folder.
    """
    done: dict[Any, Compiled] = {}

    def compile_at(bits: str, dtype: str, *, cached: bool = False) -> Compiled:
        key = (bits, dtype, cached)
        if key not in done:
            length = CACHE_LENGTH if cached else 0
            recipe = quick(
                bits, target=target, dtype=dtype, verify="off",
                cache=CacheRecipe(enabled=cached, max_length=length),
            )
            done[key] = compile_toy(config, recipe, folder(target) / "toy.onnx")
        return done[key]

    return compile_at


def run_onnx(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """The file's logits in ONNX Runtime, weight-only matmuls in full precision."""
    options = session_options(FULL_PRECISION)
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()
    (found,) = session.run(["logits"], {entry.name: ids.numpy().astype(np.int64)})
    return torch.from_numpy(found)
