"""What the tests of all passes share: a program prepared up to a pass, its text, its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fptq_compiler.graph import evaluate
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.pipeline import Pass, PassResult, run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import off_identity, relative_error
from fptq_compiler.passes import FIND_SITES, insertion
from fptq_compiler.passes.place_quantizers import PlaceQuantizers
from tests.toys import MAX_POSITIONS, Toy, ToyConfig, export_toy, make_tokens, make_toy

ONE = ToyConfig(layers=1)
"""The plainest decoder, with one block: short enough to read its whole graph."""

EXACT = 1e-10
"""Relative, on float64 logits: a right rewrite changes them by 1e-15 to 1e-13, the wrong ones of
test_wrong_variants.py by 1e-4 and more."""

SEED = 5
"""Of the parameters that the maps have while numbers are compared."""


def captured(config: ToyConfig, *steps: Pass) -> Program:
    """Return the toy's program as captured, after `steps`."""
    return _through(export_toy(config), steps)


def with_sites(config: ToyConfig, *steps: Pass) -> Program:
    """Return the toy's program with its sites found, after `steps`."""
    return captured(config, *FIND_SITES, *steps)


def transformed(config: ToyConfig, transforms: Collection[str]) -> Program:
    """Return the toy's program with the named transforms inserted, not folded."""
    places = ("down_proj",)
    return with_sites(config, *insertion(transforms, seed=SEED, scaling_places=places))


def quantized(config: ToyConfig) -> Program:
    """Return the toy's program with 4-8-8 quantisers placed, their ranges not found."""
    place = PlaceQuantizers(
        weights=4, activations=8, cache=8, block=0, embedding_bits=8, head_bits=8
    )
    return with_sites(config, *insertion((), seed=SEED, scaling_places=()), place)


def edited(config: ToyConfig, edit: Callable[[Toy], None], *steps: Pass) -> Program:
    """Return the program of a toy that `edit` has changed before its export, after `steps`."""
    toy = make_toy(config)
    edit(toy)
    return exported_module(toy, make_tokens(config, 2, 7), *steps)


def exported_module(module: nn.Module, example: Tensor, *steps: Pass) -> Program:
    """Return the program of any module with dynamic batch and sequence, after `steps`."""
    sizes = {0: Dim("batch"), 1: Dim("sequence", max=MAX_POSITIONS)}
    exported = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=False)
    return _through(exported, steps)


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """Return the program in torch's core operators, as `run_decompositions()` leaves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, as it copies its own trees
        return exported.run_decompositions()


def _through(exported: ExportedProgram, steps: tuple[Pass, ...]) -> Program:
    program = unlift(exported)
    run_passes(program, steps)
    return program


def run(program: Program, step: Pass) -> PassResult:
    """Run one pass as the pipeline does, and return what it says it did."""
    results: list[PassResult] = []
    run_passes(program, (step,), observe=lambda _, result: results.append(result))
    return results[0]


def pick(program: Program, *names: str) -> str:
    """Return the text of the nodes of these names, behind an empty line."""
    return "\n" + dump(program.module, [program.node(n) for n in names])


def span(program: Program, first: str, last: str) -> str:
    """Return the text of all nodes from one to another, behind an empty line."""
    nodes = list(program.graph.nodes)
    start, stop = (nodes.index(program.node(n)) for n in (first, last))
    return "\n" + dump(program.module, nodes[start : stop + 1])


def logits(program: Program) -> Tensor:
    """Return float64 logits (2, 11, V) with every map off identity, until it is folded."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(ToyConfig.vocabulary, (2, 11), generator=generator)
    moved = nullcontext() if "folded" in program.facts else off_identity(program, SEED)
    with torch.no_grad(), moved:
        return evaluate.logits(program.module, program.arguments(ids), torch.float64)


def change(program: Program, step: Pass) -> float:
    """Run a pass; return by how much it moved the logits, relative to the largest."""
    before = logits(program)
    assert run(program, step).changed > 0
    return relative_error(logits(program), before)


def assert_settled(program: Program, step: Pass) -> None:
    """Run a pass that has run before: it must find nothing to do."""
    before, maps = dump(program.module), list(program.maps)
    assert run(program, step).changed == 0
    assert dump(program.module) == before
    assert list(program.maps) == maps
