"""`fptq-bench` from its words to its tables, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fptq_compiler.bench import run as bench_run
from fptq_compiler.bench.result import Memory, Settings
from fptq_compiler.cli.bench import command
from fptq_compiler.cli.entry import run
from fptq_compiler.runtime.model_file import ModelFile
from fptq_compiler.runtime.session_file import SessionFile, write_session_file
from tests import cached_model
from tests.cached_model import write_cached_model

SHORT = ["--prompt-lengths", "40,2", "--decode-at", "3", "--threads", "1", "--repeats", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither long samples nor a second process: both have tests of their own."""
    monkeypatch.setattr("fptq_compiler.bench.measure.MOST_CALLS", 2)
    monkeypatch.setattr(bench_run, "measure_memory", stub_memory)


def stub_memory(file: ModelFile, settings: Settings) -> Memory | None:
    return Memory(1_500_000, 2_500_000) if file.signature.layers else None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_cached_model(tmp_path / "int8.onnx", "int8", external=True)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_cached_model(tmp_path / "float.onnx", "float32", external=True)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_cached_model(tmp_path / "plain.onnx", None, external=True)


def test_help_and_version() -> None:
    shown = CliRunner().invoke(command, ["--help"])
    assert shown.exit_code == 0
    assert "Exit codes: 0 done, 1 our bug" in shown.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[-1] in shown.output
    version = CliRunner().invoke(command, ["--version"])
    assert version.output.startswith("fptq-compiler ")


def test_two_models(
    model: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "bench.json"
    words = [str(model), "--vs", str(other), *SHORT, "--batch", "2", "--json", str(written)]
    assert run(command, words) == 0
    shown = capsys.readouterr()
    for expected in (
        "prefill 2",
        "prefill 40",
        "decode 3",
        "Kernels, prefill 40",
        "Kernels, decode 3",
        "A is faster by",
        "Softmax",
        "float32",
        "1.5",
        "2.5",
    ):
        assert expected in shown.out
    assert "timing ..." in shown.err
    found = json.loads(written.read_text(encoding="utf-8"))
    assert [(p["kind"], p["length"], p["tokens"]) for p in found["points"]] == [
        ("prefill", 2, 4),
        ("prefill", 40, 80),
        ("decode", 3, 2),
    ]
    assert all(len(p["seconds"][label]) == 2 for p in found["points"] for label in "AB")
    assert (found["settings"]["batch"], found["settings"]["threads"]) == (2, 1)
    row = found["models"]["A"]
    assert (row["file"], row["cache"], row["layers"]) == ("int8.onnx", "int8", 2)
    data = model.with_name("int8.onnx.data")
    assert row["bytes"] == model.stat().st_size + data.stat().st_size


def test_one_model_has_no_speed_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, [str(model), *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "compare with another model by --vs" in shown
    assert "faster" not in shown


def test_a_model_without_a_cache_is_measured_at_prefill_alone(
    plain: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "bench.json"
    assert run(command, [str(plain), "--vs", str(other), *SHORT, "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "none: prefill only" in shown
    assert "not known here" in shown
    assert "no cache" in next(line for line in shown.splitlines() if "decode 3" in line)
    points = json.loads(written.read_text(encoding="utf-8"))["points"]
    assert [sorted(p["seconds"]) for p in points] == [["A", "B"], ["A", "B"], ["B"]]
    assert run(command, [str(plain), *SHORT]) == 0
    assert "decode" not in capsys.readouterr().out


def test_quiet_says_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, [str(model), *SHORT, "-q"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--vs", "nowhere.onnx"], 2, "does not exist"),
        (["--prompt-lengths", "128,x"], 2, "expected positive numbers"),
        (["--decode-at", "0"], 2, "expected positive numbers"),
        (["--decode-at", "8,"], 2, "expected positive numbers"),
        (["--repeats", "0"], 2, "is not in the range"),
        (["--json", "nowhere/b.json"], 2, "there is no folder"),
        (["--plot", "nowhere/b.png"], 2, "there is no folder"),
        (["--plot", "b.pdf"], 2, "expected a name that ends in"),
        (["--provider", "abacus"], 3, "abacus is not available"),
        (["-v", "-q"], 2, "contradict"),
    ],
)
def test_what_is_refused_has_its_exit_code(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    assert run(command, [str(model), *SHORT, *words]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("no model", encoding="utf-8")
    assert run(command, [str(path)]) == 3
    assert "not an ONNX file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "past", "option"),
    [("17", "3", "--prompt-lengths 17 needs 17"), ("4", "16", "--decode-at 16 needs 17")],
)
def test_beyond_the_context(
    model: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    past: str,
    option: str,
) -> None:
    write_session_file(other, SessionFile(context_length=16))
    words = ["--prompt-lengths", prompt, "--decode-at", past]
    assert run(command, [str(model), "--vs", str(other), *words]) == 2
    message = f"{option} positions, but B, float.onnx, has a context of 16"
    assert message in capsys.readouterr().err


def test_up_to_the_end_of_the_context(model: Path) -> None:
    write_session_file(model, SessionFile(context_length=16))
    words = ["--prompt-lengths", "16", "--decode-at", "15", "--threads", "1", "--repeats", "1"]
    assert run(command, [str(model), *words, "-q"]) == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VOCABULARY", 29, "different vocabularies: int8.onnx 23, odd.onnx 29"),
        ("LAYERS", 1, "different caches (layers, KV heads, head size): int8.onnx (2, 2, 6)"),
    ],
)
def test_models_that_cannot_be_compared(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: int,
    message: str,
) -> None:
    monkeypatch.setattr(cached_model, name, value)
    odd = write_cached_model(tmp_path / "odd.onnx", "float32")
    assert run(command, [str(model), "--vs", str(odd), *SHORT]) == 2
    assert message in capsys.readouterr().err
