"""Stage one of FPTQuant: minimise the L_p norm of the transformed weights, before any data.

    minimise Σ over transformed weights of (mean |W̃|^p)^(1/p), p = 4     (arXiv 2506.04985)

The rotation of the residual stream is read by every weight; it is optimised first. Then every
attention and MLP by itself. A map acts along one axis of a weight, and every vector along that
axis is one sample of what it does: the norms are taken over a fixed random sample of VECTORS of
them, so that a step costs the same for a wide model as for a narrow one. With calibration
activations their norms are added: what enters each quantiser counts like one more weight. A map
whose other side is in no weight is trained with them only: weights alone would shrink to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph.edges import Edge, WeightEdge, chains, split
from fptq_compiler.graph.program import Program
from fptq_compiler.optimize.pool import one_thread_each
from fptq_compiler.progress import Progress
from fptq_compiler.transforms import Map, Side
from fptq_compiler.transforms.dense import shared_evaluation

VECTORS = 256  # of each weight
Curves = dict[str, list[float]]
Activations = Mapping[str, Tensor]


def lp_norm(x: Tensor, p: float) -> Tensor:
    """(mean |x|^p)^(1/p), in float32, stable for large values.

    The paper's p = 4 is two squarings, which is several times faster than a power.
    """
    peak = x.detach().abs().max().clamp_min(1e-12)
    ratio = x / peak
    powers = ratio.square().square() if p == 4 else ratio.abs().pow(p)
    return powers.mean().pow(1.0 / p) * peak


def optimize_locally(
    program: Program,
    *,
    steps: int,
    learning_rate: float,
    p: float,
    residual_learned: bool,
    seed: int,
    progress: Progress,
    activations: Activations | None = None,
) -> Curves:
    """Train all maps that have parameters; gives the loss curve of each group.

    Args:
        program: with maps inserted and weights not folded.
        steps: optimiser steps for each group; 0 leaves everything as it is.
        learning_rate: of AdamW, without weight decay.
        p: the norm.
        residual_learned: whether T_r is trained or stays the random Hadamard.
        seed: of the sampled vectors.
        progress: one step a group.
        activations: by map name, values (n, channels) that its IN side sees untransformed.

    Raises:
        OptimizationError: a loss is not finite; the message names the map.
    """
    if steps == 0:
        return {}
    plan = chains(program)
    groups = _groups(program, plan, weights_alone=not activations)
    residual = program.maps.get("residual")
    train_residual = residual_learned and residual is not None
    progress.start("local optimisation", len(groups) + int(train_residual))
    curves: Curves = {}
    if train_residual:
        assert residual is not None
        curves["residual"] = _train_residual(
            residual,
            torch.stack(_residual_vectors(program, plan, residual, seed)),
            steps,
            learning_rate,
            p,
            seed,
            progress,
        )

    def train(site: str) -> list[float]:
        return _train_site(
            program, plan, groups[site], steps, learning_rate, p, activations or {}, seed
        )

    with one_thread_each() as pool:
        for site, curve in zip(groups, pool.map(train, groups), strict=True):
            curves[site] = curve
            progress.advance(1, f"{site}: {curve[0]:.4f} -> {curve[-1]:.4f}")
    progress.done()
    return curves


def _groups(
    program: Program, plan: Mapping[str, list[Edge]], *, weights_alone: bool
) -> dict[str, list[str]]:
    """The trainable maps by site: `value.X` and `prerope.X` share the weights of one attention."""
    edges = [e for chain in plan.values() for e in chain if isinstance(e, WeightEdge)]
    writing = {e.transform for e in edges if e.port.side is Side.OUT}
    groups: dict[str, list[str]] = {}
    for name, transform in program.maps.items():
        kind, _, site = name.partition(".")
        if kind == "residual" or not transform.has_parameters:
            continue
        if transform in writing or not weights_alone:
            groups.setdefault(site, []).append(name)
    return groups


def _apply(edges: Sequence[Edge], weight: Tensor) -> Tensor:
    for edge in edges:
        weight = edge(weight)
    return weight


@torch.no_grad()
def _residual_vectors(
    program: Program, plan: Mapping[str, list[Edge]], residual: Map, seed: int
) -> list[Tensor]:
    """For each weight on the stream VECTORS vectors (n, d) that the rotation will turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, edges in plan.items():
        mine = [e for e in edges if isinstance(e, WeightEdge) and e.transform is residual]
        weight = program.parameter(name)
        if not mine or weight.dim() != 2:
            continue
        others = [e for e in edges if e not in mine]
        port = mine[0].port
        out = port.side is Side.OUT
        if port.side is Side.TABLE or (not others and weight.shape[0] > 8 * VECTORS):
            found.append(_apply(others, weight[_drawn(weight.shape[0], generator)]))
            continue
        value = _apply(others, weight)
        value = value.t()[:, port.start : port.stop] if out else value
        found.append(value[_drawn(value.shape[0], generator)])
    return found


def _drawn(count: int, generator: torch.Generator) -> Tensor:
    """VECTORS indices below `count`, some of them again where there are fewer."""
    order = torch.randperm(count, generator=generator)
    return order.repeat(-(-VECTORS // count))[:VECTORS]


def _train_residual(
    residual: Map,
    vectors: Tensor,
    steps: int,
    learning_rate: float,
    p: float,
    seed: int,
    progress: Progress,
) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        residual.parameters(), lr=learning_rate / 10, weight_decay=0.0
    )
    count = vectors.shape[1]
    curve = []
    progress.start("residual rotation", steps)
    for _ in range(steps):
        chosen = torch.randperm(count, generator=generator)[: max(1, count // 8)]
        batch = vectors[:, chosen]
        turned = residual.right(batch)
        loss = torch.stack([lp_norm(w, p) for w in turned]).sum()
        _step(optimizer, loss, "residual")
        curve.append(float(loss.detach()))
        progress.advance(1)
    progress.done()
    progress.advance(1, "residual")
    return curve


def _train_site(
    program: Program,
    plan: Mapping[str, list[Edge]],
    names: Sequence[str],
    steps: int,
    learning_rate: float,
    p: float,
    activations: Activations,
    seed: int,
) -> list[float]:
    """Train the maps of one site on its own weights; what comes before them is constant."""
    generator = torch.Generator().manual_seed(seed)
    maps = nn.ModuleList([program.maps[n] for n in names])
    trained = set(maps)
    terms: list[tuple[Tensor, list[Edge]]] = []
    for parameter, edges in plan.items():
        weight = program.parameter(parameter)
        constant, moving = split(edges, trained)
        if not moving or weight.dim() != 2:
            continue
        with torch.no_grad():
            start = _apply(constant, weight).detach()
        terms.append((_sampled(start, moving, generator), moving))
    inputs = [
        (_entering(plan, program.maps[n]), activations[n]) for n in names if n in activations
    ]
    optimizer = torch.optim.AdamW(maps.parameters(), lr=learning_rate, weight_decay=0.0)
    curve = []
    for _ in range(steps):
        with shared_evaluation(maps):
            losses = [lp_norm(_apply(edges, weight), p) for weight, edges in terms]
            losses += [lp_norm(quantized(x), p) for quantized, x in inputs]
            loss = torch.stack(losses).sum()
            _step(optimizer, loss, names[0])
        curve.append(float(loss.detach()))
    return curve


def _entering(plan: Mapping[str, list[Edge]], transform: Map) -> Callable[[Tensor], Tensor]:
    """From what a map reads to what the quantiser behind it sees, the maps between included."""
    for chain in plan.values():
        reading = [e for e in chain if isinstance(e, WeightEdge) and e.port.side is Side.IN]
        mine = next((i for i, e in enumerate(reading) if e.transform is transform), None)
        if mine is not None:
            return lambda x: _through(reading[mine:], x)
    return transform.right


def _through(edges: Sequence[WeightEdge], x: Tensor) -> Tensor:
    """The activation that a weight reads behind these maps."""
    for edge in edges:
        x = edge.inputs(x)
    return x


def _sampled(weight: Tensor, edges: Sequence[Edge], generator: torch.Generator) -> Tensor:
    """Up to VECTORS vectors along the axis that the edges act on, if they agree on one."""
    sides = {e.side for e in edges}
    if len(sides) != 1:
        return weight
    free = 1 if sides == {Side.OUT} else 0
    chosen = torch.randperm(weight.shape[free], generator=generator)[:VECTORS]
    return weight.index_select(free, chosen.to(weight.device))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, name: str) -> None:
    if not bool(torch.isfinite(loss)):
        message = (
            f"the local loss of {name} is {float(loss.detach())}, expected a finite number; "
            "check its weights, or lower [local] learning_rate"
        )
        raise OptimizationError(message)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
