"""End-to-end training of a real model, stories260K, from the command line to ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fptq_compiler.cli import compile as compile_cli
from fptq_compiler.cli import evaluate as evaluate_cli
from fptq_compiler.cli.entry import run

pytestmark = pytest.mark.slow

BOUND = 38.0  # perplexity at 4-4-4 on unseen stories: trained 36, untrained 43, rounded more
HELD_BACK = 60_000  # characters that neither calibration nor training reads


def test_training_at_4_4_4_beats_what_rounding_cannot(
    stories: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (shared_data / "text" / "tinystories_195k.txt").read_text(encoding="utf-8")
    unseen, seen = tmp_path / "unseen.txt", tmp_path / "seen.txt"
    unseen.write_text(text[:HELD_BACK], encoding="utf-8")
    seen.write_text(text[HELD_BACK:], encoding="utf-8")

    def compiled(*words: str) -> float:
        output, report = tmp_path / "stories.onnx", tmp_path / "report.json"
        options = ["--bits", "4-4-4", "--calibration", str(seen), "--report", str(report), "-q"]
        assert run(compile_cli.command, [str(stories), "-o", str(output), *options, *words]) == 0
        options = ["--text", str(unseen), "--tokenizer", str(stories), "--tokens", "8192"]
        capsys.readouterr()
        assert run(evaluate_cli.command, [str(output), *options, "--json"]) == 0
        perplexity: float = json.loads(capsys.readouterr().out)["perplexity"]
        return perplexity

    assert compiled("--recipe", "rtn") > BOUND
    assert compiled() < BOUND
    curves = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["curves"]
    held_out = curves["end to end, held out"]
    assert min(held_out) < 0.95 * held_out[0]
    assert len(curves["end to end"]) == 150
