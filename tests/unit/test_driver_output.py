"""What goes wrong after the model is read: nothing half-made is left, and a run can go on."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from fptq_compiler import calibration, driver, lower
from fptq_compiler.lower import write
from fptq_compiler.recipe import Recipe
from fptq_compiler.stages import quantizing, transforming
from tests.compiling import SMALL, quick
from tests.shop import Shop, save_export
from tests.toys import export_toy, make_tokens, make_toy


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
        driver.compile_model(export_toy(SMALL), path.with_name("toy.onnx"), options=options)
    return path


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
        (transforming, "optimize_locally"),
        (quantizing, "calibrate_activations"),
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
    monkeypatch.setattr(transforming, "optimize_locally", interrupt)
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
        Counter(transforming, "optimize_locally", monkeypatch),
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
