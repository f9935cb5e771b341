"""`fptq-eval` over files: tables, JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fptq_compiler.cli import evaluate as evaluate_cli
from fptq_compiler.cli.entry import run
from fptq_compiler.closeness import Comparison
from fptq_compiler.perplexity import ort_logits, perplexity
from tests.cached_model import VOCABULARY, write_cached_model
from tests.questions import QUERIES, SENTENCES, pairs_of, plain_score, write_rows
from tests.words import word_tokenizer

IDS = [(7 * n * n + 3 * n) % VOCABULARY for n in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, their tokenizer, a text, and the files of two tasks."""
    write_cached_model(tmp_path / "a.onnx", "int8", seed=1)
    write_cached_model(tmp_path / "b.onnx", None, seed=2)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{n}" for n in IDS), encoding="utf-8")
    write_rows(tmp_path / "piqa_valid.jsonl", QUERIES)
    write_rows(tmp_path / "winogrande_dev.jsonl", SENTENCES)
    return tmp_path


def call(folder: Path, words: str) -> int:
    """Words that name a file of the folder are its path."""
    found = [str(folder / w) if (folder / w).exists() else w for w in words.split()]
    return run(evaluate_cli.command, [*found, "--threads", "1"])


def accuracy(path: Path, rows: list[dict[str, Any]], *, by_length: bool = False) -> float:
    logits = ort_logits(path, threads=1)
    right = 0
    for row in rows:
        scores = [plain_score(logits, *pair) for pair in pairs_of(row)]
        if by_length:
            scores = [s / len(choice) for s, choice in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["gold"]
    return right / len(rows)


def test_tasks_of_two_models_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "a.onnx b.onnx --tasks piqa,winogrande,piqa --tasks-folder . --json"
    assert call(folder, words.replace(" . ", f" {folder} ")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["model"] for result in found] == ["a.onnx", "b.onnx"]
    for result in found:
        assert set(result) == {"model", "limit", "tasks"}
        assert result["limit"] is None
        piqa, winogrande = result["tasks"]
        path = folder / result["model"]
        assert (piqa["task"], piqa["rows"]) == ("piqa", 4)
        assert piqa["acc"] == accuracy(path, QUERIES)
        assert piqa["acc_norm"] == accuracy(path, QUERIES, by_length=True)
        assert winogrande["acc"] == pytest.approx(accuracy(path, SENTENCES))
        assert winogrande["acc_norm"] is None


def test_a_table_has_a_column_for_each_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"a.onnx b.onnx --tasks piqa,winogrande --tasks-folder {folder} --limit 2"
    assert call(folder, f"{words} --text text.txt --window 8 --original b.onnx") == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].strip() == "The first 2 rows of each task"
    cells = {
        label.strip(): [figure.strip() for figure in figures]
        for label, *figures in (line.strip("│").split("│") for line in lines if "│" in line)
    }
    assert list(cells) == [
        "perplexity, text.txt",
        "KL from b.onnx, nats a token",
        "Jensen-Shannon, nats a token",
        "top-1 agreement, %",
        "piqa, 2 rows: acc",
        "piqa, 2 rows: acc_norm",
        "winogrande, 2 rows: acc",
        "tasks, tokens a second",
    ]
    acc = 100 * accuracy(folder / "a.onnx", QUERIES[:2])
    error = 50.0 if acc == 50 else 0.0
    assert cells["piqa, 2 rows: acc"][0] == f"{acc:.1f} ± {error:.1f}"
    assert cells["KL from b.onnx, nats a token"][1] == "0.0000"
    assert cells["top-1 agreement, %"][1] == "100.0"
    assert "piqa" in shown.err


def test_the_original_is_compared_on_the_same_windows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a.onnx --text text.txt --window 8 --tokens 30 --original b.onnx --json"
    assert call(folder, words) == 0
    found = json.loads(capsys.readouterr().out)
    comparison = Comparison(ort_logits(folder / "b.onnx", threads=1))
    stream: Tensor = torch.tensor(IDS[:24])
    expected = perplexity(ort_logits(folder / "a.onnx", threads=1), stream, 8, compare=comparison)
    assert (found["tokens"], found["windows"]) == (24, 3)
    assert found["nll"] == pytest.approx(expected.nll)
    assert found["original"] == "b.onnx"
    assert found["kl"] == pytest.approx(comparison.result().kl)
    assert found["kl"] > found["jensen_shannon"] > 0
    assert found["top1_agreement"] == pytest.approx(comparison.result().top1_agreement)


def test_the_originals_tokenizer_serves_where_none_lies_beside(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "apart").mkdir()
    path = write_cached_model(folder / "apart" / "c.onnx", None)
    assert call(folder, f"{path} --text text.txt --window 8") == 3
    assert "say where one is with --tokenizer" in capsys.readouterr().err
    assert call(folder, f"{path} --text text.txt --window 8 --original a.onnx") == 0


def test_perplexity_alone_is_a_line_for_each_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, "a.onnx b.onnx --text text.txt --window 8") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("perplexity ")
    assert " of a.onnx on 40 tokens in 5 windows of 8, " in first
    assert " of b.onnx on 40 tokens in 5 windows of 8, " in second


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("a.onnx", 2, "nothing to measure: give --text FILE, --tasks TASK,TASK or both"),
        ("--text text.txt", 2, "Missing argument"),
        ("a.onnx --tasks pika --tasks-folder .", 2, "unknown task 'pika': did you mean 'piqa'?"),
        ("a.onnx --tasks piqa", 2, "give --tasks-folder DIR"),
        ("a.onnx --tasks arc_easy --tasks-folder .", 3, "holds no arc_easy_test.jsonl or"),
        ("a.onnx --tasks piqa --tasks-folder . --limit 0", 2, "not in the range"),
        ("a.onnx --text text.txt --limit 1", 2, "--limit belongs to --tasks"),
        ("a.onnx --text text.txt --tasks-folder .", 2, "--tasks-folder belongs to --tasks"),
        ("a.onnx --tasks piqa --tasks-folder . --original b.onnx", 2, "belongs to --text"),
        ("a.onnx --tasks piqa --tasks-folder . --tokens 600", 2, "--tokens belongs to --text"),
        ("a.onnx --text text.txt --window 8 --original text.txt", 3, "text.txt"),
    ],
)
def test_what_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, code: int, message: str
) -> None:
    assert call(folder, words.replace("-folder .", f"-folder {folder}")) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_wrong_row_is_found_before_a_model_is_opened(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder / "piqa_valid.jsonl", [*QUERIES, {**QUERIES[0], "gold": 9}])
    (folder / "a.onnx").write_bytes(b"no model")
    assert call(folder, f"a.onnx --tasks piqa --tasks-folder {folder}") == 3
    assert "error: piqa_valid.jsonl, line 5: gold is 9 of 3 choices" in capsys.readouterr().err


def test_another_models_tokenizer_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": 0, "query": "v1", "choices": ["v2", "v3"], "gold": 0}]
    write_rows(folder / "piqa_valid.jsonl", rows)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] |= {f"v{n}": VOCABULARY + n for n in range(4)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert call(folder, f"a.onnx --tasks piqa --tasks-folder {folder}") == 2
    said = capsys.readouterr().err
    assert "piqa_valid.jsonl, line 1: " in said
    assert "is this the model's own tokenizer?" in said
