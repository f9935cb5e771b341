"""What fptq-inspect says: sites, reasons with the line of the model's code, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fptq_compiler.cli.entry import run
from fptq_compiler.cli.inspect import command
from fptq_compiler.cli.inspect_text import print_inspection
from fptq_compiler.driver import inspect_file
from fptq_compiler.inspection import Inspection
from fptq_compiler.report import PACKAGES
from tests.odd_models import UNKNOWN, export_odd, half_known
from tests.toys import ToyConfig, export_toy


def archive(path: Path, exported: torch.export.ExportedProgram) -> Path:
    torch.export.save(exported, path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "toy.pt2"
    return archive(path, export_toy(ToyConfig()))


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    path = tmp_path_factory.mktemp("normed") / "toy.pt2"
    return inspect_file(archive(path, export_toy(ToyConfig(qk_norm=True))))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    path = tmp_path_factory.mktemp("half") / "toy.pt2"
    return inspect_file(archive(path, export_odd(half_known())))


def shown(found: Inspection, *, every: bool = False, width: int = 80) -> str:
    console = Console(markup=False, highlight=False, width=width)
    with console.capture() as captured:
        print_inspection(console, found, every=every)
    return captured.get()


def json_of(found: Inspection) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(found.to_json())
    return content


def test_every_reason_has_its_node_and_the_models_line(normed: Inspection) -> None:
    sites = [site for site in normed.sites if site.kind == "attention"]
    assert len(sites) == 2
    nodes = set()
    for site in sites:
        verdict = site.transforms["prerope"]
        assert not verdict.applies
        assert "a norm stands between the projection and attention" in verdict.reason
        assert verdict.source is not None
        assert Path(verdict.source.file).name == "toys.py"
        code = Path(verdict.source.file).read_text(encoding="utf-8").splitlines()
        assert "functional.rms_norm" in code[verdict.source.line - 1]
        nodes.add(verdict.node)
        assert site.transforms["value"].applies
        assert site.source is not None
        assert "self.attend(" in code[site.source.line - 1]
    assert len(nodes) == 2  # each site names its own norm


def test_a_paragraph_for_all_blocks_alike(normed: Inspection) -> None:
    text = shown(normed)
    assert text.count("a norm stands between") == 1
    assert "model.layers 0-1 self_attn (× 2)" in text
    assert "NOT RECOGNISED" not in text  # q and k belong to an attention that is known
    assert shown(normed, every=True).count("a norm stands between") == 2
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_size_of_the_model_and_what_export_costs(normed: Inspection) -> None:
    first = shown(normed).splitlines()[0]
    assert first.startswith("toy.pt2: 0.0 M parameters, 0.1 MB; capturing it took ")
    assert f"gave {normed.export.nodes} nodes" in first
    assert normed.export.bytes == 4 * normed.export.parameters
    assert normed.export.seconds > 0


def test_what_is_not_recognised_stands_out(half: Inspection) -> None:
    (row,) = [row for row in half.unrecognised if row.kind == "block"]
    assert row.place == UNKNOWN
    assert row.source is not None
    assert row.source.function == "forward"
    assert "odd_models.py" in row.source.file
    text = " ".join(shown(half).split())
    assert "NOT RECOGNISED" in text
    assert f"block: {UNKNOWN}" in text
    assert "model.layers 0,2 self_attn (× 2)" in text
    residual = half.sites[0]
    assert (residual.kind, residual.words) == ("residual", "not recognised")
    assert "reads the norm and is no plain linear" in residual.transforms["residual"].reason


def test_the_json_holds_data_not_prose(normed: Inspection) -> None:
    content = json_of(normed)
    assert (content["schema"], content["version"]) == ("fptq-inspect", 1)
    assert set(content) == {
        "schema", "version", "model", "export", "sites", "near_misses", "unrecognised",
        "quantizers", "versions",
    }
    assert set(content["versions"]) == set(PACKAGES)
    assert set(content["export"]) == {"seconds", "nodes", "parameters", "bytes"}
    for site in content["sites"]:
        assert set(site) == {
            "name", "kind", "node", "source", "shape", "words", "transforms", "quantizers",
        }
        assert set(site["source"]) == {"file", "line", "function"}
        for verdict in site["transforms"].values():
            assert set(verdict) == {"applies", "reason", "node", "source"}
    residual, attention, _, mlp, _ = content["sites"]
    assert residual["shape"] == {"width": 24, "norms": 5, "branches": 4, "tied_head": False}
    assert attention["shape"] == {
        "heads": 4, "kv_heads": 2, "head_dim": 8, "packed": False, "rope": None,
    }
    assert mlp["shape"] == {"width": 40, "gated": True, "activation": "silu", "packed": False}
    assert {m["what"] for m in content["near_misses"]} == {"prerope"}


def test_the_json_names_the_quantisers_of_the_default_recipe(plain: Path) -> None:
    content = json_of(inspect_file(plain))
    named = {q["name"]: q for q in content["quantizers"]}
    attention = content["sites"][1]
    weights = [named[q] for q in attention["quantizers"] if named[q]["kind"] == "weight"]
    inputs = [named[q] for q in attention["quantizers"] if named[q]["kind"] == "activation"]
    assert [(q["bits"], q["role"]) for q in weights] == [(4, "linear")] * 4
    assert sorted(q["role"] for q in inputs) == ["key", "linear input", "linear input", "value"]
    assert {q["bits"] for q in inputs} == {8}
    assert {q["role"] for q in named.values()} >= {"embedding", "head", "head input"}


def test_the_command_prints_text_or_json(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, [str(plain)]) == 0
    assert "yes T_k prerope" in capsys.readouterr().out
    assert run(command, [str(plain), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["sites"][1]["shape"]["rope"] == {
        "style": "half-split", "channels": 8, "scale": 1.0,
    }
    assert all(v["applies"] for s in content["sites"] for v in s["transforms"].values())


def test_the_model_is_told_as_it_is_not_as_it_becomes(tmp_path: Path) -> None:
    """A tied head is untied to see what applies, and is a tied head all the same."""
    found = inspect_file(archive(tmp_path / "toy.pt2", export_toy(ToyConfig(layers=1, tied=True))))
    assert found.sites[0].words == "width 24, 3 norms, tied head"
    assert found.sites[0].shape["tied_head"] is True
    assert found.sites[0].transforms["residual"].applies
