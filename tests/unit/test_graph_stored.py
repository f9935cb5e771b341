"""Weights in files: read where they are used, replaced in files, deleted with the last reader."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from fptq_compiler.errors import PassError
from fptq_compiler.graph import stored
from fptq_compiler.graph.evaluate import attribute, held
from fptq_compiler.graph.stored import (
    ScratchFile,
    StoredParameter,
    bind_sources,
    copy_of,
    held_for_many_runs,
    hold,
    identity,
    put_away,
)
from fptq_compiler.graph.surgery import has_attribute, set_parameter


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LARGE", 0)


@pytest.fixture
def values(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(3, 5, generator=generator)


def a_module(values: torch.Tensor, folder: Path) -> nn.Module:
    """Two tied parameters whose values lie in a file, in bfloat16."""
    module = nn.Module()
    module.first = nn.Linear(5, 3, bias=False)
    module.second = nn.Linear(5, 3, bias=False)
    module.second.weight = module.first.weight
    source = ScratchFile(folder, values.bfloat16())
    bind_sources(module, {"first.weight": source, "second.weight": source}, folder)
    return module


def test_values_are_read_in_the_parameters_own_type(values: torch.Tensor, tmp_path: Path) -> None:
    module = a_module(values, tmp_path)
    found = attribute(module, "first.weight")
    assert found.dtype == torch.float32
    assert torch.equal(found, values.bfloat16().float())
    assert held(module, "first.weight").is_meta
    assert has_attribute(module, "first.weight")


def test_what_is_read_can_be_changed_without_changing_the_file(
    values: torch.Tensor, tmp_path: Path
) -> None:
    file = ScratchFile(tmp_path, values)
    file.read().zero_()
    assert torch.equal(file.read(), values)


def test_a_replaced_parameter_goes_to_a_file_and_the_tied_one_stays(
    values: torch.Tensor, tmp_path: Path
) -> None:
    module = a_module(values, tmp_path)
    assert identity(held(module, "first.weight")) == identity(held(module, "second.weight"))
    set_parameter(module, "first.weight", values[:, :4])
    assert isinstance(held(module, "first.weight"), StoredParameter)
    assert torch.equal(attribute(module, "first.weight"), values[:, :4])
    assert torch.equal(attribute(module, "second.weight"), values.bfloat16().float())
    assert identity(held(module, "first.weight")) != identity(held(module, "second.weight"))


def test_files_go_with_their_last_reader(values: torch.Tensor, tmp_path: Path) -> None:
    module = a_module(values, tmp_path)
    for factor in (2, 3):
        set_parameter(module, "first.weight", values * factor)
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 2  # what is tied still reads the first file
    set_parameter(module, "second.weight", values)
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 2
    del module
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_copy_reads_the_same_and_is_replaced_alone(
    values: torch.Tensor, tmp_path: Path
) -> None:
    module = a_module(values, tmp_path)
    set_parameter(module, "second.weight", copy_of(held(module, "second.weight")))
    set_parameter(module, "second.weight", values + 1)
    assert torch.equal(attribute(module, "first.weight"), values.bfloat16().float())
    assert torch.equal(attribute(module, "second.weight"), values + 1)
    plain = torch.ones(2)
    assert identity(copy_of(plain)) != identity(plain)


def test_small_values_are_held(
    values: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "LARGE", values.nbytes + 1)
    module = a_module(values, tmp_path)
    assert torch.equal(module.first.weight, values.bfloat16().float())


def test_parameters_are_put_away_tied_ones_in_one_file(
    values: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Module()
    module.first, module.second = (nn.Linear(5, 3) for _ in range(2))
    module.first.weight = module.second.weight = nn.Parameter(values.t().contiguous().t())
    monkeypatch.setattr(stored, "LARGE", values.nbytes)
    put_away(module, tmp_path)
    assert isinstance(held(module, "first.weight"), StoredParameter)
    assert identity(held(module, "first.weight")) == identity(held(module, "second.weight"))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(attribute(module, "first.weight"), values)
    assert not isinstance(held(module, "first.bias"), StoredParameter)
    set_parameter(module, "first.weight", values + 1)
    assert torch.equal(attribute(module, "second.weight"), values)


def test_a_transpose_in_the_same_memory_has_a_file_of_its_own(tmp_path: Path) -> None:
    square = torch.arange(9.0).reshape(3, 3)
    module = nn.Module()
    module.first, module.second = (nn.Linear(3, 3, bias=False) for _ in range(2))
    module.first.weight = nn.Parameter(square)
    module.second.weight = nn.Parameter(square.t())
    put_away(module, tmp_path)
    assert torch.equal(attribute(module, "first.weight"), square)
    assert torch.equal(attribute(module, "second.weight"), square.t())


def test_hold_reads_everything(values: torch.Tensor, tmp_path: Path) -> None:
    module = a_module(values, tmp_path)
    hold(module)
    assert torch.equal(module.first.weight, values.bfloat16().float())
    assert not any(isinstance(p, StoredParameter) for p in module.parameters())


def test_weights_are_held_for_many_runs_where_they_are_few(
    values: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = a_module(values, tmp_path)
    before = held(module, "second.weight")
    with held_for_many_runs(module):
        assert torch.equal(module.second.weight, values.bfloat16().float())
    assert held(module, "second.weight") is before
    monkeypatch.setattr(stored, "HELD", before.nbytes - 1)
    with held_for_many_runs(module):
        assert held(module, "second.weight") is before


def test_large_values_made_of_a_stored_parameter_are_mapped(
    values: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = held(a_module(values, tmp_path), "first.weight")
    found = origin.mapped(values)
    assert torch.equal(found, values)
    assert found is not values
    monkeypatch.setattr(stored, "LARGE", values.nbytes + 1)
    assert origin.mapped(values) is values


def test_a_value_cannot_be_taken_by_mistake(values: torch.Tensor, tmp_path: Path) -> None:
    module = a_module(values, tmp_path)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        module.first.weight.cpu()


def test_a_folder_that_is_gone_is_named(values: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="cannot keep 0 MB of weights in"):
        ScratchFile(tmp_path / "gone", values)
