"""The four tasks on a trained model: scores in batches are those of one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_compiler import driver
from fptq_compiler.progress import SilentProgress
from fptq_compiler.tasks.evaluate import evaluate_task
from fptq_compiler.tasks.rows import TASKS, read_task
from fptq_compiler.text import load_tokenizer

pytestmark = pytest.mark.slow

ROWS = 8


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_scored_as_by_a_plain_loop(
    stories: Path, shared_data: Path, name: str
) -> None:
    logits, _ = driver.original_logits(stories)
    tokenizer = load_tokenizer(stories)
    task = read_task(name, shared_data / "tasks", ROWS)
    found = evaluate_task(logits, tokenizer, task, SilentProgress())
    right = right_by_length = tokens = 0
    for question in task.questions:
        scores = []
        for choice in question.choices:
            whole, alone = (
                tokenizer.encode(text, add_special_tokens=False)
                for text in (choice.context + choice.continuation, choice.context)
            )
            log_p = logits(torch.tensor([whole]))[0].double().log_softmax(-1)
            scored = range(len(alone), len(whole))
            scores.append(sum(float(log_p[n - 1, whole[n]]) for n in scored))
            tokens += len(whole) - 1
        right += scores.index(max(scores)) == question.gold
        if question.lengths is not None:
            scores = [s / n for s, n in zip(scores, question.lengths, strict=True)]
            right_by_length += scores.index(max(scores)) == question.gold
    assert found.acc == right / ROWS
    assert found.acc_norm == (right_by_length / ROWS if name != "winogrande" else None)
    assert found.tokens == tokens
