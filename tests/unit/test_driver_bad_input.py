"""What goes wrong on the way: the message, the exit code, and that nothing half-made is left."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from fptq_compiler import calibration, driver, lower, stages
from fptq_compiler.cli.compile import command
from fptq_compiler.cli.entry import run
from fptq_compiler.lower import write
from fptq_compiler.recipe import Recipe
from tests.compiling import SMALL, exported, quick
from tests.toys import ToyConfig, make_tokens, make_toy

FREE = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}


def archive(config: ToyConfig, folder: Path) -> Path:
    """The toy as a user would save it."""
    path = folder / "toy.pt2"
    torch.export.save(exported(config), path)
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(SMALL, tmp_path_factory.mktemp("toy"))


@dataclass
class Shop:
    """A folder for inputs and an empty one for the output, and the command line over both."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    recipe: Recipe
    shown: str = ""
    said: str = ""

    @property
    def output(self) -> Path:
        return self.folder / "out" / "toy.onnx"

    def compile(self, model: Path, *words: str | Path, recipe: Recipe | None = None) -> int:
        """Run fptq-compile; keeps what it showed and what it said on stderr."""
        toml = self.folder / "recipe.toml"
        toml.write_text((recipe or self.recipe).to_toml(), encoding="utf-8")
        options = ["--recipe", str(toml), *map(str, words)]
        code = run(command, [str(model), "-o", str(self.output), *options])
        self.shown, self.said = self.capture.readouterr()
        return code

    def nothing_left(self) -> bool:
        """Whether the output's folder is as empty as before: no file, no temporary folder."""
        return list(self.output.parent.iterdir()) == []

    def fails(self, code: int, message: str, model: Path, *words: str | Path, **rest: Any) -> None:
        assert self.compile(model, *words, **rest) == code, self.said
        assert message in self.said
        assert "this is our bug" not in self.said
        assert "Traceback" not in self.said
        assert self.nothing_left()


@pytest.fixture
def shop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shop:
    (tmp_path / "out").mkdir()
    return Shop(tmp_path, capsys, quick("4-8-8"))


@pytest.fixture
def same_model(monkeypatch: pytest.MonkeyPatch, translated: Path) -> None:
    """Translate to ONNX once for all tests that fail after that, for it takes seconds."""
    monkeypatch.setattr(lower, "to_onnx", lambda program, target: ir.load(translated))


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch.onnx makes of the toy, before INT4 is packed."""
    path = tmp_path_factory.mktemp("translated") / "raw.onnx"
    original = lower.to_onnx

    def keep(program: Any, target: Any) -> ir.Model:
        ir.save(original(program, target), path)
        return ir.load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "to_onnx", keep)
        options = driver.Options(recipe=quick("4-8-8"))
        driver.compile_model(exported(SMALL), path.with_name("toy.onnx"), options=options)
    return path


# --- the model ---------------------------------------------------------------------------------


def test_not_an_archive(shop: Shop) -> None:
    path = shop.folder / "notes.pt"
    path.write_text("dear diary", encoding="utf-8")
    shop.fails(3, "notes.pt: expected a torch.export archive", path)


def test_an_empty_file(shop: Shop) -> None:
    path = shop.folder / "nothing.pt"
    path.touch()
    shop.fails(3, "found an empty file", path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_truncated_archive(shop: Shop, toy: Path, part: float) -> None:
    path = shop.folder / "half.pt2"
    content = toy.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    shop.fails(3, "half.pt2: the archive is truncated or damaged", path)


def test_another_pickle(shop: Shop) -> None:
    path = shop.folder / "state.pt"
    torch.save(make_toy(SMALL).state_dict(), path)
    shop.fails(3, "--trust-pickle", path)
    shop.fails(3, "expected a pickled torch.nn.Module, found OrderedDict", path, "--trust-pickle")


def test_a_pickled_module_needs_example_inputs(shop: Shop) -> None:
    path = shop.folder / "toy.pt"
    torch.save(make_toy(SMALL), path)
    shop.fails(3, "--trust-pickle", path)
    shop.fails(3, "can only be exported with example inputs", path, "--trust-pickle")
    words = np.zeros((2, 7), dtype=np.float32)
    examples = shop.folder / "examples.npy"
    np.save(examples, words)
    shop.fails(
        3, "expected integer token ids", path, "--trust-pickle", "--example-inputs", examples
    )
    np.save(examples, np.zeros((2, 3, 4), dtype=np.int64))
    shop.fails(
        3, "found int64 [2, 3, 4]", path, "--trust-pickle", "--example-inputs", examples
    )


class Stack(nn.Module):
    """An embedding and linear layers: no attention, no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.first(self.embed(ids)))


class Convolution(nn.Module):
    """A picture in, numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, picture: Tensor) -> Tensor:
        return self.layer(picture).relu().mean((2, 3))


def save_export(module: nn.Module, example: Tensor, path: Path) -> Path:
    dynamic = (FREE,) if example.dim() == 2 else ({},)
    program = torch.export.export(
        module.eval(), (example,), dynamic_shapes=dynamic, strict=False
    )
    torch.export.save(program, path)
    return path


def test_a_graph_with_no_transformer_in_it(shop: Shop) -> None:
    ids = torch.zeros(2, 7, dtype=torch.int64)
    linears = save_export(Stack(), ids, shop.folder / "stack.pt2")
    shop.fails(3, "no attention and no MLP was found in the graph", linears)
    assert "fptq-inspect" in shop.said
    pictures = save_export(Convolution(), torch.zeros(2, 3, 8, 8), shop.folder / "conv.pt2")
    shop.fails(3, "the graph embeds no token ids", pictures)


def test_weights_that_are_not_numbers(shop: Shop) -> None:
    broken = make_toy(SMALL)
    broken.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    path = save_export(broken, make_tokens(SMALL, 2, 7), shop.folder / "nan.pt2")
    shop.fails(3, "model.layers.0.mlp.up_proj.weight has 1 values that are NaN", path)


# --- sites -------------------------------------------------------------------------------------


def test_a_demanded_transform_without_a_site(shop: Shop) -> None:
    path = archive(ToyConfig(layers=1, qk_norm=True), shop.folder)
    shop.fails(3, "the recipe demands prerope", path, "--transforms", "prerope,value")
    assert "near miss: prerope at rms_norm" in shop.said
    assert "a norm stands between the projection and attention" in shop.said
    assert "toys.py" in shop.said


def test_a_demanded_value_transform_where_v_has_two_readers(shop: Shop) -> None:
    path = archive(ToyConfig(layers=1, value_readers=2), shop.folder)
    shop.fails(3, "the recipe demands value", path, "--transforms", "value")
    assert "v has a second reader, mean" in shop.said


# --- calibration -------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary(shop: Shop, toy: Path) -> None:
    ids = shop.folder / "ids.npy"
    np.save(ids, np.full((4, 24), 61))
    shop.fails(3, "61", toy, "--calibration", ids)
    assert "ids.npy" in shop.said
    np.save(ids, np.full((4, 24), -1))
    shop.fails(3, "-1", toy, "--calibration", ids)


def test_an_empty_calibration_file(shop: Shop, toy: Path) -> None:
    path = shop.folder / "empty.npy"
    path.touch()
    shop.fails(3, "empty.npy: the file is empty", toy, "--calibration", path)
    np.save(path, np.zeros((0, 24), dtype=np.int64))
    shop.fails(3, "empty.npy", toy, "--calibration", path)


def test_an_object_array_is_not_unpickled(shop: Shop, toy: Path) -> None:
    path = shop.folder / "objects.npy"
    marker = shop.folder / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    shop.fails(3, "objects.npy", toy, "--calibration", path)
    assert not marker.exists()


def test_text_without_a_tokenizer(shop: Shop, toy: Path) -> None:
    path = shop.folder / "text.txt"
    path.write_text("once upon a time", encoding="utf-8")
    shop.fails(3, "tokenizer", toy, "--calibration", path)


# --- the output --------------------------------------------------------------------------------


def no_space(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_permission(*arguments: object, **options: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_folder_that_may_not_be_written_to(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    shop.fails(5, "no permission to write", toy)
    monkeypatch.undo()
    # Permission can be lost while the model is compiled.
    monkeypatch.setattr(tempfile, "mkdtemp", no_permission)
    shop.fails(5, "cannot write to", toy)
    assert "Permission denied" in shop.said


@pytest.mark.usefixtures("same_model")
@pytest.mark.parametrize("call", ["save", "move"])
def test_a_full_disk(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    if call == "save":
        monkeypatch.setattr(write.ir, "save", no_space)
    else:
        monkeypatch.setattr(Path, "replace", no_space)
    shop.fails(5, "No space left on device", toy)


def test_a_work_folder_that_cannot_be_made(shop: Shop, toy: Path) -> None:
    (shop.folder / "file").touch()
    shop.fails(5, "cannot make the work folder", toy, "--work-dir", shop.folder / "file" / "work")


@pytest.mark.parametrize("name", ["np.save", "save_file"])
def test_a_work_folder_that_is_full(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = shop.folder / "work"
    monkeypatch.setattr(f"fptq_compiler.work.{name}", no_space)
    shop.fails(5, "to the work folder", toy, "--work-dir", folder)
    assert "No space left on device" in shop.said
    assert not list(folder.glob("*.partial"))


@pytest.mark.usefixtures("same_model")
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (calibration, "self_generated"),
        (stages, "optimize_locally"),
        (stages, "calibrate_activations"),
        (lower, "pack_int4"),
        (lower, "check_parity"),
    ],
    ids=["calibration", "local", "ranges", "lowering", "check"],
)
def test_an_interrupt_leaves_nothing(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    monkeypatch.setattr(place, name, interrupt)
    shop.fails(130, "interrupted: nothing was written", toy)


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_an_earlier_file_survives_a_failure(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.output.write_bytes(b"earlier")
    monkeypatch.setattr(stages, "optimize_locally", interrupt)
    assert shop.compile(toy) == 130
    assert shop.output.read_bytes() == b"earlier"


# --- a file that is not what was compiled --------------------------------------------------------


def corrupt_one_code(pack: Callable[[ir.Model], int]) -> Callable[[ir.Model], int]:
    """Pack as always, then move one code of the first packed weight by one."""

    def packed(model: ir.Model) -> int:
        count = pack(model)
        value = next(
            v for v in model.graph.initializers.values()
            if v.const_value is not None and v.const_value.dtype == ir.DataType.INT4
        )
        assert value.const_value is not None
        codes = value.const_value.numpy().copy()
        codes.flat[0] = 1 if int(codes.flat[0]) <= 0 else -1
        value.const_value = ir.tensor(codes, name=value.name)
        return count

    return packed


@pytest.mark.usefixtures("same_model")
def test_a_wrong_file_is_not_written_but_by_force(
    shop: Shop, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower, "pack_int4", corrupt_one_code(lower.pack_int4))
    shop.fails(4, "the weight codes in the file are not the program's", toy)
    assert "--force" in shop.said
    report = shop.folder / "report.json"
    assert shop.compile(toy, "--force", "--report", report) == 0
    assert shop.output.exists()
    assert "WRITTEN BY --force ALTHOUGH: the weight codes" in " ".join(shop.shown.split())
    decisions = json.loads(report.read_text(encoding="utf-8"))["decisions"]
    assert any(words.startswith("WRITTEN BY --force") for words in decisions)


# --- beside the output ---------------------------------------------------------------------------


@pytest.mark.usefixtures("same_model")
def test_report_and_dumps_are_written(shop: Shop, toy: Path) -> None:
    report, dumps = shop.folder / "report.json", shop.folder / "dumps"
    assert shop.compile(toy, "--report", report, "--dump-dir", dumps) == 0
    names = sorted(path.name for path in shop.output.parent.iterdir())
    assert names == ["toy.onnx", "toy.onnx.session.json"]
    found = json.loads(report.read_text(encoding="utf-8"))
    assert Recipe.from_toml(found["recipe"], "report") == shop.recipe
    stages = [row["name"] for row in found["stages"]]
    assert stages[0] == "capture"
    assert stages[-1] == "check against ONNX Runtime"
    assert found["size_after"] == shop.output.stat().st_size
    assert all(len(curve) == 3 for curve in found["curves"].values())
    assert max(found["preserved"].values()) < 1e-6  # float64, weights rounded to float32
    texts = {path.name.partition("_")[2]: path.read_text(encoding="utf-8")
             for path in dumps.iterdir()}
    assert "fptq.attention" in texts["raise_attention.txt"]
    assert "fptq.fake_quantize" in texts["freeze_quantizers.txt"]
    assert len(texts) == len(list(dumps.iterdir()))  # no pass overwrote another's


def test_quiet_is_quiet(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """At the level of file descriptors, for torch's loggers have streams of their own."""
    (tmp_path / "out").mkdir()
    shop = Shop(tmp_path, capfd, quick("16-16-16"))
    assert shop.compile(toy, "-q", "--transforms", "none") == 0
    assert (shop.shown, shop.said) == ("", "")


# --- going on ------------------------------------------------------------------------------------


class Counter:
    """Counts the calls of what it stands for."""

    def __init__(self, place: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.original = getattr(place, name)
        patch.setattr(place, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.original(*arguments, **options)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter, Counter]:
    """Counters of the two long pieces of work that a work folder keeps."""
    return (
        Counter(calibration, "self_generated", monkeypatch),
        Counter(stages, "optimize_locally", monkeypatch),
    )


def test_an_interrupted_run_goes_on(
    shop: Shop, toy: Path, work: tuple[Counter, Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shop.compile(toy) == 0
    uninterrupted = shop.output.read_bytes()
    for path in shop.output.parent.iterdir():
        path.unlink()
    folder = shop.folder / "work"
    with monkeypatch.context() as patch:
        patch.setattr(driver, "lower", interrupt)
        shop.fails(130, "interrupted", toy, "--work-dir", folder)
    assert [counter.calls for counter in work] == [2, 2]
    assert shop.compile(toy, "--work-dir", folder) == 0
    assert [counter.calls for counter in work] == [2, 2]
    assert shop.output.read_bytes() == uninterrupted


def test_what_another_model_or_recipe_left_is_not_used(
    shop: Shop, toy: Path, work: tuple[Counter, Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "lower", interrupt)
    folder = shop.folder / "work"
    other = save_export(
        make_toy(SMALL, seed=1), make_tokens(SMALL, 2, 7), shop.folder / "other.pt2"
    )
    recipe = replace(shop.recipe, seed=1)
    for expected, model, chosen in ((1, other, None), (2, toy, None), (3, toy, recipe)):
        assert shop.compile(model, "--work-dir", folder, recipe=chosen) == 130
        assert [counter.calls for counter in work] == [expected, expected]
    assert shop.compile(toy, "--work-dir", folder) == 130
    assert [counter.calls for counter in work] == [3, 3]


def test_a_damaged_work_folder_is_done_again(
    shop: Shop, toy: Path, work: tuple[Counter, Counter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "lower", interrupt)
    folder = shop.folder / "work"
    assert shop.compile(toy, "--work-dir", folder) == 130
    kept = sorted(folder.iterdir())
    assert [path.suffix for path in kept] == [".npy", ".safetensors"]
    for path in kept:
        path.write_bytes(path.read_bytes()[:40])
    assert shop.compile(toy, "--work-dir", folder) == 130, shop.said
    assert [counter.calls for counter in work] == [2, 2]
