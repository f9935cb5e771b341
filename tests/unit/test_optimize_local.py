"""Local optimisation: what it minimises, what it leaves alone, and that it can be repeated."""

import pytest
import torch

from fptq_compiler.errors import OptimizationError
from fptq_compiler.graph.edges import chains, split
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.verify import off_identity
from fptq_compiler.optimize.inputs import map_inputs
from fptq_compiler.optimize.local import _apply, lp_norm, optimize_locally
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import TRANSFORMS
from tests.passes.steps import transformed
from tests.toys import ToyConfig


@pytest.fixture
def program() -> Program:
    return transformed(ToyConfig(), TRANSFORMS)


def optimize(program: Program, **settings: object) -> dict[str, list[float]]:
    defaults = {
        "steps": 30, "learning_rate": 1e-2, "p": 4.0, "residual_learned": True, "seed": 0,
        "progress": SilentProgress(),
    }
    return optimize_locally(program, **{**defaults, **settings})


def test_the_norm_is_the_papers() -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    for p in (3.0, 4.0):
        expected = (x.abs() ** p).mean() ** (1 / p)
        assert lp_norm(x, p) == pytest.approx(expected.item(), rel=1e-6)  # float32 rounding


def test_every_group_gets_better(program: Program) -> None:
    curves = optimize(program)
    assert set(curves) == {
        "residual",
        *(f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")),
    }
    for name, curve in curves.items():
        assert min(curve[-5:]) < curve[0], name


def test_all_maps_move_and_weights_do_not(program: Program) -> None:
    weights = {k: v.clone() for k, v in program.module.named_parameters() if "weight" in k}
    before = {n: [p.clone() for p in m.parameters()] for n, m in program.maps.items()}
    optimize(program)
    for name, parameters in before.items():
        after = list(program.maps[name].parameters())
        assert all(not torch.equal(a, b) for a, b in zip(parameters, after, strict=True)), name
    assert all(torch.equal(program.parameter(k), v) for k, v in weights.items())


def test_the_same_seed_gives_the_same_maps() -> None:
    curves = [optimize(transformed(ToyConfig(), TRANSFORMS), steps=5) for _ in range(2)]
    assert curves[0] == curves[1]


def test_a_fixed_rotation_stays(program: Program) -> None:
    before = program.maps["residual"].matrix()
    curves = optimize(program, residual_learned=False, steps=3)
    assert "residual" not in curves
    assert torch.equal(program.maps["residual"].matrix(), before)


def test_no_steps_do_nothing(program: Program) -> None:
    assert optimize(program, steps=0) == {}


def test_what_is_applied_once_commutes_with_what_is_trained(program: Program) -> None:
    names = ("updown.model.layers.0.mlp", "value.model.layers.0.self_attn")
    trained = {program.maps[n] for n in names}
    with torch.no_grad(), off_identity(program, 5):
        for name, edges in chains(program).items():
            weight = program.parameter(name).double()
            constant, moving = split(edges, trained)
            expected = _apply(edges, weight)
            found = _apply(moving, _apply(constant, weight))
            # float64: the same products in another order
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_loss_that_is_not_finite_names_the_map(program: Program) -> None:
    with torch.no_grad():
        program.maps["updown.model.layers.1.mlp"].log_scale.fill_(float("nan"))
    with pytest.raises(OptimizationError, match=r"updown\.model\.layers\.1\.mlp is nan"):
        optimize(program, residual_learned=False)


def test_inputs_of_maps_are_those_without_the_transform(program: Program) -> None:
    ids = torch.arange(24).reshape(2, 12)
    plain = map_inputs(program, [ids])
    assert {n.partition(".")[0] for n in plain} == {"prerope", "value", "updown"}
    with off_identity(program, 3):
        moved = map_inputs(program, [ids])
    for name, rows in plain.items():
        assert rows.shape[1] % program.maps[name].size == 0  # query heads share a block
        # float32 through two layers of a toy
        assert (rows - moved[name]).abs().max() <= 1e-4 * rows.abs().max(), name


def test_activations_are_part_of_the_objective(program: Program) -> None:
    ids = torch.arange(24).reshape(2, 12)
    activations = map_inputs(program, [ids])
    site = "model.layers.0.mlp"
    with_them = optimize(program, activations=activations, steps=2)[site]
    without = optimize(transformed(ToyConfig(), TRANSFORMS), steps=2)[site]
    assert with_them[0] > without[0]
