"""Evaluations in words: a line of perplexity, or a table of all measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from fptq_compiler.evaluation import Evaluation
from fptq_compiler.tasks.evaluate import TaskResult


def perplexity_line(found: Evaluation, window: int) -> str:
    """Gives the perplexity of one model, on windows of `window` tokens, in a line."""
    result = found.perplexity
    assert result is not None
    return (
        f"perplexity {result.perplexity:.2f} ({result.nll:.4f} nats a token) of {found.model} on "
        f"{result.tokens} tokens in {result.windows} windows of {window}, {result.seconds:.1f} s"
    )


def evaluation_table(found: Sequence[Evaluation]) -> Table:
    """Makes the table: a line for each measure, a column for each model.

    Args:
        found: of each model, with the same measures.
    """
    limit, tasks = found[0].limit, found[0].tasks
    table = Table(
        title=f"The first {limit:,} rows of each task" if limit is not None else None,
        caption="Accuracies in per cent, with their standard errors." if tasks else None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for evaluation in found:
        table.add_column(evaluation.model, justify="right", overflow="fold")
    for lines in zip(*map(_lines, found), strict=True):
        table.add_row(lines[0][0], *(figure for _, figure in lines))
    return table


def _lines(found: Evaluation) -> Iterator[tuple[str, str]]:
    """Label and figure of each measure of one model."""
    if found.perplexity is not None:
        yield f"perplexity, {found.text}", f"{found.perplexity.perplexity:,.2f}"
    if found.closeness is not None:
        yield f"KL from {found.original}, nats a token", f"{found.closeness.kl:.4f}"
        yield "Jensen-Shannon, nats a token", f"{found.closeness.jensen_shannon:.4f}"
        yield "top-1 agreement, %", f"{100 * found.closeness.top1_agreement:.1f}"
    for task in found.tasks:
        name = f"{task.task}, {task.rows:,} rows"
        yield f"{name}: acc", _share(task.acc, task.acc_stderr)
        if task.acc_norm is not None:
            yield f"{name}: acc_norm", _share(task.acc_norm, task.acc_norm_stderr)
    if found.tasks:
        yield "tasks, tokens a second", _speed(found.tasks)


def _share(value: float, standard_error: float | None) -> str:
    """In per cent, such as `68.0 ± 4.7`."""
    error = "" if standard_error is None else f" ± {100 * standard_error:.1f}"
    return f"{100 * value:.1f}{error}"


def _speed(tasks: Sequence[TaskResult]) -> str:
    return f"{sum(t.tokens for t in tasks) / sum(t.seconds for t in tasks):,.0f}"
