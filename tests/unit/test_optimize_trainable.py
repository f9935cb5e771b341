"""What is trained: groups with their rates, scales that stay positive, and nothing else."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fptq_compiler.graph.program import Program
from tests.quantized_toy import Quantized, groups_of, parameters_of, quantized


@pytest.fixture
def toy() -> Iterator[Quantized]:
    with quantized() as made:
        yield made


def state(program: Program) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in program.module.state_dict().items()}


def _parameters(program: Program, *kinds: str) -> set[str]:
    found = {
        f"{name}/{key}" for name, transform in program.maps.items()
        for key, _ in transform.named_parameters() if name.partition(".")[0] in kinds
    }
    assert found
    return found


def test_groups_hold_maps_scales_and_zero_points(toy: Quantized) -> None:
    program = toy.program
    linears = [q.module for q in program.weight_quantizers if q.role == "linear"]
    activations = [q.module for q in program.activation_quantizers]
    with groups_of(toy) as groups:
        found = {group.name: set(group.parameters) for group in groups}
    assert found == {
        "transforms": _parameters(program, "prerope", "updown"),
        "matrices": _parameters(program, "value"),
        "weight scales": {f"{path}/scale" for path in linears},
        "activation scales": {f"{path}/scale" for path in activations},
        "zero-points": {f"{path}/zero_point" for path in activations},
    }


def test_a_rate_of_zero_leaves_its_group_out(toy: Quantized) -> None:
    with groups_of(toy, transforms_rate=0.0, matrices_rate=0.0, zero_points_rate=0.0) as groups:
        assert [group.name for group in groups] == ["weight scales", "activation scales"]
        moving = {id(p) for p in toy.program.module.parameters() if p.requires_grad}
        assert moving == {id(p) for p in parameters_of(groups)}


def test_only_the_groups_move_and_all_of_them(toy: Quantized) -> None:
    before = state(toy.program)
    with groups_of(toy) as groups:
        changed = {name.replace("/", ".") for group in groups for name in group.parameters}
        with torch.no_grad():
            for parameter in parameters_of(groups):
                parameter.add_(0.25)
    after = state(toy.program)
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.allclose(after[name], before[name])}
    untrained = {"embedding", "head"}
    fixed = {q.module for q in toy.program.weight_quantizers if q.role in untrained}
    assert len(fixed) == 2
    assert not any(name.startswith(tuple(fixed)) for name in moved)
    assert not any(name.startswith(("model.", "lm_head.")) for name in moved)
    scales = {name for name in changed if name.endswith((".scale", ".zero_point"))}
    assert scales <= moved
    assert all(name.startswith(("edges.", "mean_shifts.")) for name in moved - scales)


def test_scales_stay_positive_under_the_largest_steps(toy: Quantized) -> None:
    with groups_of(toy) as groups:
        scales = [p for g in groups if g.name.endswith("scales") for p in g.parameters.values()]
        with torch.no_grad():
            for scale in scales:
                scale.sub_(50.0)
        modules = [toy.program.module.get_submodule(q.module)
                   for q in toy.program.activation_quantizers]
        assert all(bool((module.scale > 0).all()) for module in modules)
    assert all(0 < float(module.scale.max()) < 1e-15 for module in modules)


def test_afterwards_scales_are_plain_parameters_again(toy: Quantized) -> None:
    before = state(toy.program)
    with groups_of(toy):
        pass
    after = state(toy.program)
    assert after.keys() == before.keys()
    for name, value in after.items():
        # exp(log(s)) in float32
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)
    for quantizer in (*toy.program.weight_quantizers, *toy.program.activation_quantizers):
        module = toy.program.module.get_submodule(quantizer.module)
        assert type(module.scale) is nn.Parameter
        assert not module.scale.requires_grad


def test_after_an_error_they_are_too(toy: Quantized) -> None:
    def fail() -> None:
        with groups_of(toy):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    first = toy.program.activation_quantizers[0].module
    assert type(toy.program.module.get_submodule(first).scale) is nn.Parameter
