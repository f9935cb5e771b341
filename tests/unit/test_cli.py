from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import fptq_compiler
from fptq_compiler.cli import compile as compile_cli
from fptq_compiler.cli import evaluate as evaluate_cli
from fptq_compiler.cli import inspect as inspect_cli
from fptq_compiler.cli.entry import run
from fptq_compiler.errors import (
    CaptureError,
    FptqError,
    LoweringError,
    OptimizationError,
    PassError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)
from fptq_compiler.inspection import ExportCost, Inspection
from fptq_compiler.report import AuditRow, Report, SiteRow, StageRow

COMMANDS = (compile_cli.command, inspect_cli.command, evaluate_cli.command)


def example_report() -> Report:
    report = Report("toy.pt", size_before=4_000_000, size_after=1_000_000)
    report.sites = [
        SiteRow(f"blocks.{n}.mlp", "mlp", "gated [8, 16]", ("updown",), {"hadamard": "no order"})
        for n in (0, 1, 2)
    ]
    report.near_misses = ["add_7: no norm reads it (toy.py:12)"] * 2
    report.stages = [StageRow("capture", 1.25, 100.0), StageRow("lower", 2.5, 90.0)]
    report.audit = [
        AuditRow("linear weights", "INT4", "INT4", 6, 1000),
        AuditRow("head", "INT8", "FLOAT", 1, 4000),
    ]
    report.parity = {"worst relative": 3.2e-6, "fused": 7}
    report.decisions = ["untied the head from the embedding"]
    return report


class StubDriver(ModuleType):
    """Stands where the driver stands, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__("fptq_compiler.driver")
        self.action: Callable[[], object] = lambda: None
        self.calls: list[Any] = []
        self.tokenizer: Path | None = None

    @staticmethod
    def Options(**fields: object) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    def compile_file(self, model: Path, output: Path, options: Any, progress: Any) -> Report:
        self.calls.append((model, output, options))
        progress.start("work", 2)
        progress.advance(1, "half")
        self.action()
        progress.done()
        return example_report()

    def inspect_file(self, model: Path, **flags: object) -> Inspection:
        self.calls.append((model, flags))
        self.action()
        return Inspection(model.name, ExportCost(1.25, 812, 1_000_000, 4_000_000), ())

    def original_logits(self, model: Path, *, trust_pickle: bool) -> object:
        self.calls.append((model, trust_pickle))
        return lambda ids: torch.zeros(*ids.shape, 8), self.tokenizer


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    stub = StubDriver()
    text = ModuleType("fptq_compiler.text")
    text.load_tokenizer = lambda path: path  # type: ignore[attr-defined]
    text.token_stream = (  # type: ignore[attr-defined]
        lambda path, tokenizer, limit: torch.arange(64)[:limit] % 8
    )
    for name, module in (("driver", stub), ("text", text)):
        monkeypatch.setitem(sys.modules, f"fptq_compiler.{name}", module)
        monkeypatch.setattr(fptq_compiler, name, module, raising=False)
    return stub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "toy.pt"
    path.write_bytes(b"model")
    return path


def compile_words(model: Path, *more: str) -> list[str]:
    return [str(model), "-o", str(model.with_suffix(".onnx")), *more]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_and_version(command: click.Command) -> None:
    runner = CliRunner()
    shown = runner.invoke(command, ["--help"])
    assert shown.exit_code == 0
    assert "Exit codes: 0 done, 1 our bug" in shown.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[-1] in shown.output
    version = runner.invoke(command, ["--version"])
    assert version.output.startswith("fptq-compiler ")
    assert "onnxruntime 1." in version.output


def test_compile_passes_everything_on(driver: StubDriver, model: Path) -> None:
    text = model.with_name("text.txt")
    text.write_text("words", encoding="utf-8")
    words = "--bits 4-4-4 --transforms value --samples 3 --sequence-length 64 --verify full"
    words += " --embedding-bits 4 --head-bits 16 --rounding gptq"
    reports = (model.with_name("r.json"), model.with_name("r.html"))
    files = ["--calibration", str(text), "--report", str(reports[0]), "--report", str(reports[1])]
    code = run(
        compile_cli.command,
        compile_words(model, *words.split(), "--seed", "5", "--force", *files),
    )
    assert code == 0
    _, output, options = driver.calls[0]
    assert output == model.with_suffix(".onnx")
    assert str(options.recipe.bits) == "4-4-4"
    assert (options.recipe.embedding_bits, options.recipe.head_bits) == (4, 16)
    assert options.recipe.weights.rounding == "gptq"
    assert options.recipe.transforms.names == ("value",)
    assert (options.recipe.calibration.samples, options.recipe.calibration.length) == (3, 64)
    assert (options.recipe.verify, options.recipe.seed) == ("full", 5)
    assert (options.calibration, options.force, options.device) == (text, True, "cpu")
    assert (options.trust_pickle, options.work_dir) == (False, None)
    assert (options.reports, options.quick_report) == (reports, False)


def test_compile_prints_a_summary_and_progress_apart(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compile_cli.command, compile_words(model)) == 0
    shown = capsys.readouterr()
    for words in (
        "blocks 0-2 mlp",
        "gated [8, 16]",
        "hadamard: no order",
        "add_7: no norm reads it (toy.py:12) (×2)",
        "worst relative: 3.2e-06",
        "untied the head",
        "4.0 MB before, 1.0 MB after",
    ):
        assert words in shown.out
    assert "NO" in next(line for line in shown.out.splitlines() if "FLOAT" in line)
    assert "work ..." in shown.err
    assert "work" not in shown.out.split("Stages")[0]


def test_quiet_says_nothing(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compile_cli.command, compile_words(model, "-q")) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("mend it"), 2),
        (CaptureError("mend it"), 3),
        (UnsupportedModelError("mend it", ["node add_1"]), 3),
        (PassError("mend it"), 1),
        (VerificationError("mend it"), 4),
        (OptimizationError("mend it"), 4),
        (LoweringError("mend it"), 5),
    ],
)
def test_each_error_has_its_exit_code(
    driver: StubDriver,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    error: FptqError,
    code: int,
) -> None:
    def fail() -> None:
        raise error

    driver.action = fail
    assert run(compile_cli.command, compile_words(model)) == code
    shown = capsys.readouterr()
    assert "error: mend it" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert run(inspect_cli.command, [str(model), "-v"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ZeroDivisionError, EOFError])
def test_any_other_exception_is_our_bug(
    driver: StubDriver,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    kind: type[Exception],
) -> None:
    def fail() -> None:
        message = "one\ntwo"
        raise kind(message)

    driver.action = fail
    assert run(compile_cli.command, compile_words(model)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    bug = f"this is our bug, please report it: {kind.__name__}: one"
    assert last == f"{bug} (run again with -v to see where)"
    assert run(compile_cli.command, compile_words(model, "-v")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    driver.action = interrupt
    assert run(compile_cli.command, compile_words(model)) == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "5-8-8"], "expected W-A-KV"),
        (["--transforms", "hadamar"], "did you mean 'hadamard'?"),
        (["--recipe", "rtm"], "did you mean 'rtn'?"),
        (["--target", "qqd"], "did you mean 'qdq'?"),
        (["--samples", "0"], "calibration.samples is 0"),
        (["--samples", "x"], "is not a valid integer"),
        (["--bitz", "1"], "No such option"),
        (["--device", "tpu"], "is not one of"),
        (["-v", "-q"], "contradict"),
        (["--calibration", "nowhere.txt"], "does not exist"),
        (["-o", "nowhere/at/all.onnx"], "there is no folder"),
    ],
)
def test_usage_and_recipe_errors_are_2(
    driver: StubDriver,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert run(compile_cli.command, compile_words(model, *words)) == 2
    assert message in capsys.readouterr().err
    assert driver.calls == []


def test_the_model_is_never_overwritten(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(compile_cli.command, [str(model), "-o", str(model)]) == 2
    assert "that is the model itself" in capsys.readouterr().err


def test_cuda_without_a_device_is_refused(
    driver: StubDriver,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(compile_cli.command, compile_words(model, "--device", "cuda")) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_inspect_prints_tables_or_json(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(inspect_cli.command, [str(model)]) == 0
    assert "capturing it took 1.2 s and gave 812 nodes" in capsys.readouterr().out
    assert run(inspect_cli.command, [str(model), "--json", "--trust-pickle"]) == 0
    assert json.loads(capsys.readouterr().out)["export"]["parameters"] == 1_000_000
    assert driver.calls[1][1] == {
        "trust_pickle": True, "example_inputs": None, "graph": None,
    }


def test_eval_of_an_original_model(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = model.with_name("text.txt")
    text.write_text("words", encoding="utf-8")
    words = [str(model), "--text", str(text), "--window", "8"]
    assert run(evaluate_cli.command, words) == 3
    assert "say where one is with --tokenizer" in capsys.readouterr().err
    driver.tokenizer = model
    assert run(evaluate_cli.command, [*words, "--tokens", "32"]) == 0
    assert "perplexity 8.00" in capsys.readouterr().out
    assert run(evaluate_cli.command, [*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["tokens"], result["windows"]) == ("toy.pt", 64, 8)
    assert run(evaluate_cli.command, [*words, "--tokens", "7"]) == 2
    assert "--tokens 7 does not fill one window of 8" in capsys.readouterr().err


def test_eval_of_a_file_that_is_no_onnx(
    driver: StubDriver, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model.rename(model.with_suffix(".onnx"))
    words = [str(file), "--text", str(file), "--tokenizer", str(file)]
    assert run(evaluate_cli.command, words) == 3
    assert "not an ONNX file" in capsys.readouterr().err
