"""The drawing of a model: what is drawn, where it stands, and that the file is sound."""

from __future__ import annotations

import errno
import os
import re
from functools import cache
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fptq_compiler.cli.entry import run
from fptq_compiler.cli.inspect import command
from fptq_compiler.drawing.blocks import common_name, runs
from fptq_compiler.drawing.layout import lay_out, spine
from fptq_compiler.drawing.make import Draft, make_scene
from fptq_compiler.drawing.page import page
from fptq_compiler.drawing.scene import INPUT, BlockScene, Box, Chip, Run, Scene
from fptq_compiler.drawing.svg import draw
from fptq_compiler.drawing.twins import merge_twins
from fptq_compiler.explain import (
    AsFound,
    explain_misses,
    explain_quantizers,
    explain_sites,
    prepare,
)
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.inspection import ExportCost, Inspection
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.recipe import Recipe
from fptq_compiler.stages import look_into
from tests.odd_models import UNKNOWN, export_odd, half_known
from tests.toys import ToyConfig, export_toy

HOSTILE = "</title><script>alert(1)</script>\" onload='x'&"
CONFIGS = {
    "plain": ToyConfig(),
    "packed": ToyConfig(packed_qkv="split", packed_gate_up="chunk"),
    "normed": ToyConfig(qk_norm=True),
    "two readers": ToyConfig(value_readers=2),
}


def scene_of(exported: torch.export.ExportedProgram) -> Scene:
    program = look_into(exported)
    run_passes(program, FIND_SITES)
    draft, as_found = Draft(program), AsFound.of(program)
    prepare(program, Recipe())
    found = Inspection(
        "toy.pt2", ExportCost(1.0, 110, 13_448, 53_792), explain_sites(program, as_found),
        explain_misses(program), (), explain_quantizers(program),
    )
    return make_scene(draft, program, found)


@cache
def toy_scene(name: str) -> Scene:
    return scene_of(export_toy(CONFIGS[name]))


@cache
def half_scene() -> Scene:
    return scene_of(export_odd(half_known()))


def texts(block: BlockScene) -> list[str]:
    """Each box with its chips, in the order of the graph."""
    return [" ".join([box.title, *(chip.text for chip in box.chips)]) for box in block.boxes]


def readers(block: BlockScene, title: str) -> set[str]:
    boxes = block.boxes
    return {boxes[b].title for a, b in block.edges if a != INPUT and boxes[a].title == title}


# --- what is drawn -------------------------------------------------------------------------------


def test_a_block_stands_for_all_that_are_alike() -> None:
    scene = toy_scene("plain")
    assert [(r.name, r.count) for r in scene.runs] == [
        ("embedding", 1), ("model.layers 0-1", 2), ("head", 1),
    ]
    (block,) = scene.runs[1].blocks
    assert texts(block) == [
        "input_layernorm S_n", "INT8",
        "q_proj T_r T_k INT4", "k_proj T_r T_k INT4", "v_proj T_r T_v INT4",
        "attention K INT8 V INT8", "INT8", "o_proj T_r T_v INT4", "+",
        "post_attention_layernorm S_n", "INT8", "gate_proj T_r INT4", "up_proj T_r T_u INT4",
        "silu × up", "T_d", "INT8", "down_proj T_r T_u T_d INT4", "+",
    ]
    assert block.boxes[2].lines == ("24 → 32",)
    assert block.boxes[5].lines == ("4 heads · 2 KV · 8 channels", "RoPE half-split", "causal")
    assert readers(block, "q_proj") == {"attention"}
    assert readers(block, "silu × up") == {"T_d"}
    assert readers(block, "T_d") == {"INT8"}


def test_packed_projections_are_one_box() -> None:
    (block,) = toy_scene("packed").runs[1].blocks
    (qkv,) = [box for box in block.boxes if box.title == "qkv_proj"]
    assert qkv.lines == ("24 → 64", "q 32 · k 16 · v 16")
    assert [chip.text for chip in qkv.chips] == ["T_r", "T_k", "T_v", "INT4"]
    assert readers(block, "gate_up_proj") == {"silu × up"}


def test_a_refused_transform_is_shown_with_its_reason() -> None:
    (block,) = toy_scene("normed").runs[1].blocks
    (core,) = [box for box in block.boxes if box.kind == "attention"]
    assert Chip("refused", "T_k") in core.chips
    reasons = dict(core.details)
    assert "a norm stands between" in reasons["no T_k"]
    assert "toys.py:" in reasons["no T_k"]
    assert readers(block, "q_norm") == {"attention"}


def test_a_part_that_is_not_recognised_is_drawn_as_such() -> None:
    scene = half_scene()
    assert [r.name for r in scene.runs] == [
        "embedding", "model.layers.0", UNKNOWN, "model.layers.2", "head",
    ]
    (block,) = scene.runs[2].blocks
    (box,) = [box for box in block.boxes if box.kind == "unknown"]
    assert box.lines == ("cumsum, div",)
    assert readers(block, "not recognised") == {"INT8"}


def test_every_linear_is_drawn_once() -> None:
    for name in CONFIGS:
        scene = toy_scene(name)
        weights = [
            text
            for r in scene.runs for block in r.blocks * r.count for box in block.boxes
            for label, text in box.details if label == "weight" and box.kind == "linear"
        ]
        packed = name == "packed"
        assert len(weights) == 2 * (4 if packed else 7) + 1


# --- runs of blocks ------------------------------------------------------------------------------


def simple(name: str, title: str) -> BlockScene:
    return BlockScene(name, (Box("linear", title),), ((INPUT, 0),), (0,))


def test_runs_of_one_kind_and_of_alternating_kinds() -> None:
    kinds = ["e", *"SG" * 13, "h"]
    blocks = [simple(f"layers.{i}", kind) for i, kind in enumerate(kinds)]
    found = runs(blocks)
    assert [(len(r.blocks), r.count) for r in found] == [(1, 1), (2, 13), (1, 1)]
    assert found[1].name == "layers 1-26"
    five_and_one = [simple(f"layers.{i}", "G" if i % 6 == 5 else "S") for i in range(26)]
    assert [(len(r.blocks), r.count) for r in runs(five_and_one)] == [(6, 4), (1, 2)]


def expert_block(widths: list[int]) -> BlockScene:
    """A norm, a router, for each expert an up and a down projection, and their sum."""
    boxes, edges = [Box("norm", "norm"), Box("linear", "router")], [(INPUT, 0), (0, 1)]
    for width in widths:
        up = len(boxes)
        boxes += [Box("linear", "up", (f"8 → {width}",)), Box("linear", "down", (f"{width} → 8",))]
        edges += [(0, up), (up, up + 1)]
    total = len(boxes)
    edges += [(down, total) for down in range(3, total, 2)] + [(1, total)]
    return BlockScene("layers.0", (*boxes, Box("other", "sum")), tuple(edges), (total,))


def test_experts_that_are_alike_are_drawn_once() -> None:
    merged = merge_twins(expert_block([16] * 8))
    assert texts(merged) == ["norm", "router", "up × 8", "down × 8", "sum"]
    assert merged.edges == ((INPUT, 0), (0, 1), (0, 2), (1, 4), (2, 3), (3, 4))
    assert merged.gives == (4,)


def test_an_expert_that_differs_stands_alone() -> None:
    merged = merge_twins(expert_block([16, 16, 24, 16]))
    assert texts(merged) == ["norm", "router", "up × 3", "down × 3", "up", "down", "sum"]


def test_what_stands_behind_one_another_is_not_alike() -> None:
    boxes = tuple(Box("linear", "same") for _ in range(4))
    chain = BlockScene("layers.0", boxes, ((INPUT, 0), (0, 1), (1, 2), (2, 3)), (3,))
    assert merge_twins(chain) == chain


def test_names_of_runs() -> None:
    assert common_name(["head"]) == "head"
    assert common_name(["model.layers.0", "model.layers.1"]) == "model.layers 0-1"
    assert common_name(["first", "last"]) == "first to last"


# --- where it stands -----------------------------------------------------------------------------


def all_blocks() -> list[BlockScene]:
    scenes = [*(toy_scene(name) for name in CONFIGS), half_scene()]
    return [block for scene in scenes for r in scene.runs for block in r.blocks]


def test_no_box_stands_on_another() -> None:
    for block in all_blocks():
        layout = lay_out(block)
        for a, b in combinations(layout.places, 2):
            apart = abs(a.x - b.x) >= (a.width + b.width) / 2 or (
                abs(a.y - b.y) >= (a.height + b.height) / 2
            )
            assert apart, (block.name, a, b)
            assert min(a.x - a.width / 2, a.y - a.height / 2) >= -1e-6
            assert a.x + a.width / 2 <= layout.width + 1e-6


def test_what_reads_stands_below() -> None:
    for block in all_blocks():
        places = lay_out(block).places
        for a, b in block.edges:
            assert a == INPUT or places[a].y < places[b].y


def test_the_stream_is_a_straight_line_beside_the_branches() -> None:
    (block,) = toy_scene("plain").runs[1].blocks
    layout, rail = lay_out(block), spine(block)
    assert [block.boxes[i].title for i in rail] == ["+", "+"]
    assert {layout.places[i].x for i in rail} == {layout.rail}
    others = [p for i, p in enumerate(layout.places) if i not in rail]
    assert min(p.x - p.width / 2 for p in others) > layout.rail + 11


# --- the file ------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags, the places that links lead to, and those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: set[str] = set()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.attributes |= set(given)
        self.names.add(given.get("id") or "")
        if "href" in given:
            self.links.add(given["href"] or "")


def hostile_scene() -> Scene:
    box = Box("linear", HOSTILE, (HOSTILE,), (Chip("value", HOSTILE),), ((HOSTILE, HOSTILE),))
    run_of_two = Run((BlockScene(HOSTILE, (box,), ((INPUT, 0),), (0,)),), 2, HOSTILE)
    return Scene(HOSTILE, HOSTILE, ((Chip("value", "T_v"), HOSTILE),), (run_of_two,))


def test_names_of_a_model_are_text_and_nothing_else() -> None:
    root = ElementTree.fromstring(draw(hostile_scene()))
    found = "".join(root.itertext())
    assert found.count(HOSTILE) >= 6
    reader = Reader()
    reader.feed(page(hostile_scene()))
    assert "script" not in reader.tags
    assert "onload" not in reader.attributes


def test_the_svg_is_sound_and_stands_alone() -> None:
    text = draw(toy_scene("plain"))
    root = ElementTree.fromstring(text)
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names == {"svg", "title", "desc", "style", "rect", "text", "path", "circle", "g"}
    assert re.findall(r"https?://\S+", text) == ['http://www.w3.org/2000/svg"']
    words = "".join(root.itertext())
    assert "× 2" in words
    assert "model.layers 0-1 (2 times)" in words  # for those who do not see it
    assert "prefers-color-scheme: dark" in words
    assert "weight: model.layers.0.self_attn.q_proj.weight" in words


def test_every_link_of_the_page_leads_somewhere() -> None:
    reader = Reader()
    reader.feed(page(toy_scene("normed")))
    targets = {link.removeprefix("#") for link in reader.links}
    assert len(targets) > 20
    assert targets <= reader.names
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["html", "svg"])
def test_the_command_draws(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    path = tmp_path / f"model.{ending}"
    assert run(command, [str(toy), "--graph", str(path)]) == 0
    assert "attention" in capsys.readouterr().out
    assert "q_proj" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["model.png", "model", "nowhere/model.svg"])
def test_what_cannot_be_drawn_to_is_refused_before_the_work(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(command, [str(toy), "--graph", str(tmp_path / name)]) == 2
    assert "--graph" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_is_written_whole_or_not_at_all(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    assert run(command, [str(toy), "--graph", str(tmp_path / "model.svg")]) == 5
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
