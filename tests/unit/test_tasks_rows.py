from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fptq_compiler.errors import CaptureError, RecipeError
from fptq_compiler.tasks.rows import TASKS, Choice, check_tasks, read_task
from tests.questions import QUERIES, SENTENCES, write_rows

GOOD = QUERIES[0]


def test_a_query_is_continued_by_each_choice_after_a_space(tmp_path: Path) -> None:
    write_rows(tmp_path / "piqa_valid.jsonl", QUERIES)
    task = read_task("piqa", tmp_path)
    assert (task.name, len(task.questions)) == ("piqa", 4)
    first = task.questions[0]
    assert first.choices[2] == Choice("w1 w2 w3", " w7 w8 w9 w10")
    assert (first.gold, first.lengths) == (1, (5, 2, 12))
    assert first.where == "piqa_valid.jsonl, line 1"


def test_a_sentence_goes_on_behind_each_choice(tmp_path: Path) -> None:
    write_rows(tmp_path / "winogrande_dev.jsonl", SENTENCES)
    first, *_, last = read_task("winogrande", tmp_path).questions
    assert first.choices == (Choice("w1 w2 w5", " w3 w4"), Choice("w1 w2 w6 w7", " w3 w4"))
    assert first.lengths is None
    assert last.choices[0] == Choice("w2", " w1")


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "piqa_valid.jsonl", QUERIES)
    path.write_text(path.read_text(encoding="utf-8") + "not JSON\n", encoding="utf-8")
    found = read_task("piqa", tmp_path, limit=3).questions
    assert [question.gold for question in found] == [1, 0, 2]


def test_gzip_and_empty_lines(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) + "\n" for row in QUERIES)
    (tmp_path / "hellaswag_val.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = read_task("hellaswag", tmp_path).questions
    assert [question.where for question in found][:2] == [
        "hellaswag_val.jsonl.gz, line 1", "hellaswag_val.jsonl.gz, line 3",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query is None"),
        ({"query": " "}, "query is ' '"),
        ({"choices": "w1"}, "choices is 'w1', not a list of two or more texts"),
        ({"choices": ["w1"]}, "not a list of two"),
        ({"choices": ["w1", 2]}, "not a list of two"),
        ({"choices": ["w1", ""]}, "not a list of two"),
        ({"gold": "1"}, "gold is '1' of 3 choices"),
        ({"gold": True}, "gold is True of 3 choices"),
        ({"gold": 3}, "gold is 3 of 3 choices"),
        ({"gold": -1}, "gold is -1 of 3 choices"),
    ],
)
def test_a_row_that_is_not_as_expected_names_file_and_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_rows(tmp_path / "piqa_valid.jsonl", [GOOD, {**GOOD, **change}])
    with pytest.raises(CaptureError) as caught:
        read_task("piqa", tmp_path)
    said = str(caught.value)
    assert said.startswith("piqa_valid.jsonl, line 2: ")
    assert message in said
    assert said.endswith('{"query": text, "choices": [text, …], "gold": index of a choice}')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: not JSON \("),
        ("[1]", "line 1: found list"),
        ('{"query": "w1"}', "choices and gold missing"),
        (json.dumps(SENTENCES[0]), "line 1: query missing"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "piqa_valid.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(CaptureError, match=message):
        read_task("piqa", tmp_path)


@pytest.mark.parametrize("sentence", ["w1 w2", "w1 _ w2 _ w3", "w1 w2 _ "])
def test_a_sentence_has_one_blank_with_text_behind(tmp_path: Path, sentence: str) -> None:
    write_rows(tmp_path / "winogrande_dev.jsonl", [{**SENTENCES[0], "sentence": sentence}])
    with pytest.raises(CaptureError, match=r'line 1: .* without one "_" that text follows'):
        read_task("winogrande", tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"holds no arc_easy_test.jsonl or arc_easy_test.jso"):
        read_task("arc_easy", tmp_path)
    (tmp_path / "piqa_valid.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(CaptureError, match=r"piqa_valid.jsonl: the file is empty"):
        read_task("piqa", tmp_path)
    whole = gzip.compress(json.dumps(GOOD).encode() * 100)
    for content in (b"no gzip", whole[:40], whole[:12] + b"\xff" * 20):
        (tmp_path / "hellaswag_val.jsonl.gz").write_bytes(content)
        with pytest.raises(CaptureError, match=r"hellaswag_val.jsonl.gz: expected UTF-8 text"):
            read_task("hellaswag", tmp_path)
    (tmp_path / "arc_easy_test.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CaptureError, match="expected UTF-8 text"):
        read_task("arc_easy", tmp_path)


def test_an_unknown_task_names_the_nearest() -> None:
    check_tasks(tuple(TASKS))
    with pytest.raises(RecipeError, match="unknown task 'arc-easy': did you mean 'arc_easy'"):
        check_tasks(("piqa", "arc-easy"))
    with pytest.raises(RecipeError, match="known are piqa, arc_easy, winogrande, hellaswag"):
        check_tasks(("",))
