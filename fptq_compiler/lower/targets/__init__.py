"""The targets: which node forms, and what a session needs to run them well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from fptq_compiler.errors import RecipeError
from fptq_compiler.graph.program import Program
from fptq_compiler.recipe import Recipe

Contract = Callable[[Program, ir.Model, ir.Model], list[str]]


def _takes_everything(recipe: Recipe, float_type: str) -> str:
    return ""


@dataclass(frozen=True)
class Target:
    """One way to write a program as ONNX.

    Attributes:
        name: as `--target` knows it.
        translations: from a frozen program to its emitters by operator.
        expansions: the forms of carried operators by name.
        contract: from the program, the written and the optimised graph to broken promises.
        refusal: why the target cannot write a recipe in a float type; empty where it can.
        functions: from the opset to a function that the expansions call.
        float_types: what a file may compute in, the target's own first.
        symmetric_activations: whether activations must have a zero-point of 0.
        packed_projections: whether attention reads query, key and value side by side.
        epsilon_channel: whether a scaled stream carries its epsilon as a channel.
        opset: of the standard domain, 21 or later.
        ir_version: of the file.
        providers: ONNX Runtime's execution providers, in order.
        session_config: entries of the session's configuration that the forms rely on.
    """

    name: str
    translations: Callable[[Program], dict[Any, Callable[..., Any]]]
    expansions: Mapping[str, Callable[..., tuple[Any, ...]]]
    contract: Contract
    refusal: Callable[[Recipe, str], str] = _takes_everything
    functions: tuple[Callable[[int], ir.Function], ...] = ()
    float_types: tuple[str, ...] = ("float32",)
    symmetric_activations: bool = False
    packed_projections: bool = False
    epsilon_channel: bool = False
    opset: int = 21
    ir_version: int = 10
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    session_config: Mapping[str, str] = field(default_factory=dict)


def target_of(name: str) -> Target:
    """The target that `--target` names.

    Raises:
        KeyError: there is no such target; recipes refuse the name before.
    """
    from fptq_compiler.lower.targets import ort_cpu, ort_cuda, qdq, tensorrt

    targets = (qdq.TARGET, ort_cpu.TARGET, ort_cuda.TARGET, tensorrt.TARGET)
    return {t.name: t for t in targets}[name]


def float_type_of(recipe: Recipe) -> str:
    """What the file computes in: float32, float16 or bfloat16.

    Raises:
        RecipeError: the target cannot write this recipe, and why.
    """
    target = target_of(recipe.target)
    chosen = target.float_types[0] if recipe.dtype == "auto" else recipe.dtype
    if chosen not in target.float_types:
        message = (
            f"dtype {chosen}: target {target.name} computes in "
            f"{' or '.join(target.float_types)}; for half precision use --target ort-cuda"
        )
        raise RecipeError(message)
    reason = target.refusal(recipe, chosen)
    if reason:
        message = f"target {target.name}: {reason}"
        raise RecipeError(message)
    return chosen
