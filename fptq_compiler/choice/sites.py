"""At which sites a transform stays: the loss of held-out text with it and without, all else alike.

One quantised program has every transform, another lacks one kind. Text runs through the first.
In front of each block a run parts from it, goes through that block of the second program and then
on through the first, so that at the end there is a loss for each site without its transform.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph.blocks import logits_node, outline
from fptq_compiler.graph.edges import OnlineEdge, WeightEdge, is_online, take_out
from fptq_compiler.graph.evaluate import Environment, bind_inputs
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.batches import Batches
from fptq_compiler.optimize.block_function import BlockFunction, block_functions
from fptq_compiler.optimize.divergence import jensen_shannon
from fptq_compiler.optimize.token_parts import TOKENS_AT_ONCE
from fptq_compiler.passes.fold_transforms import FoldTransforms
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import Recipe
from fptq_compiler.report import Report
from fptq_compiler.stages.quantizing import find_ranges
from fptq_compiler.stages.transforming import find_sites, insert_transforms
from fptq_compiler.summary import transform_of
from fptq_compiler.trial import trial

TOKENS = 1024
"""Of the held-out text, at most."""


@dataclass(frozen=True)
class Place:
    """One kind of transform in one block, most often one site.

    Attributes:
        kind: the transform.
        block: the name of the block.
        maps: their names in the program.
        online: whether any of them is computed at run time.
    """

    kind: str
    block: str
    maps: tuple[str, ...]
    online: bool

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names as a recipe has them, transform.site."""
        sites = dict.fromkeys(name.partition(".")[2] for name in self.maps)
        return tuple(f"{self.kind}.{site}" for site in sites)


@dataclass(frozen=True)
class Worth:
    """By how much the loss is higher without a transform, in nats a token.

    Attributes:
        mean: over all tokens.
        error: its standard error, from pieces of some neighbouring tokens.
    """

    mean: float
    error: float

    def stays(self, online: bool) -> bool:
        """What is merged costs nothing, and goes only where that clearly helps."""
        return self.mean > 0.0 if online else self.mean > -self.error


def choose_sites(
    program: Program, recipe: Recipe, ids: Tensor, rows: Tensor, report: Report, progress: Progress
) -> Recipe:
    """The recipe with the sites at which a transform is left out.

    They are left out together only if that has no higher loss than with all of them.

    Args:
        program: as captured; left as it is.
        recipe: how it is compiled.
        ids: calibration tokens (samples, length).
        rows: training tokens (N, S).
        report: gets a decision for every kind of transform.
        progress: one step a kind and block.
    """
    chosen, aside = trial(recipe), Report(origin="trial")
    inserted = program.copy()
    find_sites(inserted, chosen, aside)
    insert_transforms(inserted, chosen, ids, aside, progress)
    places = find_places(inserted)
    if not places:
        return recipe
    held_out = Batches.split(
        rows, held_out=recipe.training.held_out, size=1, seed=recipe.seed
    ).held_out
    judge = Judge(program, held_out[: max(1, TOKENS // rows.shape[1])])
    progress.start("choosing sites", len(places))
    everything = quantised(inserted, (), chosen, ids, progress)
    worths: dict[Place, Worth] = {}
    for kind in dict.fromkeys(place.kind for place in places):
        mine = [place for place in places if place.kind == kind]
        lacking = quantised(inserted, [n for p in mine for n in p.maps], chosen, ids, progress)
        found = judge.worths(everything, lacking, {p.block: p for p in mine}, progress)
        worths.update(found)
        report.decisions.append(_words(kind, found))
    progress.done()
    going = [place for place, worth in worths.items() if not worth.stays(place.online)]
    if not going:
        return recipe
    without = quantised(inserted, [n for p in going for n in p.maps], chosen, ids, progress)
    with_all, with_less = judge.loss(everything), judge.loss(without)
    better = with_less <= with_all
    report.decisions.append(
        f"held-out loss without these {len(going)} {with_less:.4f}, with them {with_all:.4f}: "
        f"{'left out' if better else 'kept'}"
    )
    if not better:
        return recipe
    names = (*recipe.transforms.left_out, *(n for p in going for n in p.left_out))
    return replace(recipe, transforms=replace(recipe.transforms, left_out=names))


def find_places(program: Program) -> list[Place]:
    """Where the maps stand that one block alone reads."""
    names = {transform: name for name, transform in program.maps.items()}
    blocks: dict[str, set[str]] = {}
    online: set[str] = set()
    for block in outline(program):
        for node in block.nodes:
            if node.op != "call_module":
                continue
            edge = program.module.get_submodule(str(node.target))
            if isinstance(edge, (WeightEdge, OnlineEdge)) and edge.transform in names:
                name = names[edge.transform]
                blocks.setdefault(name, set()).add(block.name)
                if is_online(program, node):
                    online.add(name)
    found: dict[tuple[str, str], list[str]] = {}
    for name, read_by in blocks.items():
        if len(read_by) == 1:
            (block_name,) = read_by
            found.setdefault((transform_of(name), block_name), []).append(name)
    return [
        Place(kind, block, tuple(maps), not online.isdisjoint(maps))
        for (kind, block), maps in found.items()
    ]


class Judge:
    """Losses of held-out text against the original, in pieces of some neighbouring tokens."""

    def __init__(self, original: Program, ids: Tensor) -> None:
        self._ids = ids
        self._expected = original.run(ids)

    def loss(self, program: Program) -> float:
        """The mean Jensen-Shannon divergence in nats a token."""
        return float(self._losses(program.run(self._ids)).mean())

    @torch.no_grad()
    def worths(
        self, program: Program, lacking: Program, places: Mapping[str, Place], progress: Progress
    ) -> dict[Place, Worth]:
        """What a transform is worth at each place, by the block that it is in."""
        logits = logits_node(program)
        main = bind_inputs(program.module, program.arguments(self._ids), None)
        parted: dict[Place, Environment] = {}
        there = {node.name: node for node in lacking.graph.nodes}
        back = {node.name: node for node in program.graph.nodes}
        pairs = zip(block_functions(program), block_functions(lacking), strict=True)
        for block, other in pairs:
            parted = {p: self._through(block, v, logits) for p, v in parted.items()}
            if block.name in places:
                parted[places[block.name]] = _named(back, other(_named(there, main)))
                progress.advance(1, f"{places[block.name].kind} in {block.name}")
            main = self._through(block, main, logits)
        found = {}
        for place, losses in parted.items():
            more = losses[logits] - main[logits]
            found[place] = Worth(float(more.mean()), _standard_error(more))
        return found

    def _through(self, block: BlockFunction, values: Environment, logits: Node) -> Environment:
        """What leaves a block; of the logits, which are large, the losses alone."""
        found = block(values)
        return {n: self._losses(v) if n is logits else v for n, v in found.items()}

    def _losses(self, logits: Tensor) -> Tensor:
        """Of each piece the mean over its tokens, from logits (B, S, V)."""
        parts = (torch.split(x.flatten(0, 1), TOKENS_AT_ONCE) for x in (logits, self._expected))
        return torch.stack([jensen_shannon(*pair) for pair in zip(*parts, strict=True)])


def _standard_error(values: Tensor) -> float:
    """Of the mean of (n,); infinite where there is but one value."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.inf


def _named(nodes: Mapping[str, Node], values: Environment) -> Environment:
    """The same values under the nodes of another program."""
    return {nodes[node.name]: value for node, value in values.items()}


def quantised(
    inserted: Program, without: Sequence[str], recipe: Recipe, ids: Tensor, progress: Progress
) -> Program:
    """A copy without some maps, the others merged, with quantisers whose ranges are found.

    Args:
        inserted: with all maps on their edges; left as it is.
        without: names of maps.
        recipe: bits and norms.
        ids: calibration tokens (samples, length).
        progress: listens.
    """
    program = inserted.copy()
    take_out(program, without)
    run_passes(program, (FoldTransforms(),))
    find_ranges(program, recipe, ids, Report(origin="trial"), progress)
    return program


def _words(kind: str, worths: Mapping[Place, Worth]) -> str:
    going = [place for place, worth in worths.items() if not worth.stays(place.online)]
    means = [worth.mean for worth in worths.values()]
    words = (
        f"{kind} by site: leaving it out changes the held-out loss by {min(means):+.4f} to "
        f"{max(means):+.4f}, {statistics.mean(means):+.4f} in the mean; it goes at {len(going)} "
        f"of {len(worths)}"
    )
    return f"{words}: {', '.join(n for p in going for n in p.left_out)}" if going else words
