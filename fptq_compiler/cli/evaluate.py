"""`fptq-eval`: perplexity and tasks of ONNX files in ONNX Runtime, or of the original model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fptq_compiler.cli.console import listening
from fptq_compiler.cli.entry import EXIT_CODES, Settings, run, version_text
from fptq_compiler.errors import CaptureError, RecipeError
from fptq_compiler.tasks.rows import TASKS, Task, check_tasks, read_task

if TYPE_CHECKING:
    from fptq_compiler.evaluation import Evaluation
    from fptq_compiler.likelihood import LogitsFunction
    from fptq_compiler.progress import Progress

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def task_names(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...]:
    """Reads names of tasks with commas between; each counts once.

    Raises:
        RecipeError: there is no such task.
    """
    if value is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    check_tasks(names)
    return names


@click.command(name="fptq-eval", epilog=EXIT_CODES)
@click.argument(
    "models",
    metavar="MODEL.onnx|MODEL...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, path_type=Path),
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="UTF-8 text, tokenised once as a whole and cut into windows, for the perplexity.",
)
@click.option(
    "--original",
    type=click.Path(exists=True, path_type=Path),
    metavar="MODEL",
    help="Compare the distributions on the text with those of this model.",
)
@click.option(
    "--tasks",
    callback=task_names,
    metavar="TASK,TASK",
    help=f"Tasks to measure the accuracy in, of {', '.join(TASKS)}.",
)
@click.option(
    "--tasks-folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the files of the tasks lie, .jsonl or .jsonl.gz.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take the first N rows of each task only.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR|FILE",
    help="Tokenizer, where none lies beside the ONNX file and the model brings none.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    metavar="T",
    help="Tokens of each forward pass over the text; windows do not overlap.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="Take the first N tokens of the text only; without it the whole text.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of ONNX Runtime within one operator.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, a line for each model, instead of words."
)
@click.option("--trust-pickle", is_flag=True, help="Read a model that is, or holds, a pickle.")
@click.option("-v", "--verbose", is_flag=True, help="The log and tracebacks.")
@click.version_option(version_text(), message="%(version)s")
@click.pass_obj
def command(
    settings: Settings,
    *,
    models: tuple[Path, ...],
    text: Path | None,
    original: Path | None,
    tasks: tuple[str, ...],
    tasks_folder: Path | None,
    limit: int | None,
    tokenizer: Path | None,
    window: int,
    tokens: int | None,
    threads: int | None,
    as_json: bool,
    trust_pickle: bool,
    verbose: bool,
) -> None:
    """Measure the perplexity of models on a text, and their accuracy in tasks.

    A file that ends in .onnx runs in ONNX Runtime on the CPU; anything else is read as
    fptq-compile reads it and runs as it was, unquantised.

    Each window of the text predicts all its tokens but the first; a shorter rest at the end
    is left out. With --original the same predictions are compared by KL and Jensen-Shannon
    divergence and by how often the likeliest token is the same.

    A task's choices are scored by their log-likelihood, as lm-evaluation-harness does: acc
    takes the likeliest choice, acc_norm the likeliest by character.

    Example: fptq-eval int4.onnx float.onnx --tasks piqa,hellaswag --tasks-folder DIR
    """
    settings.set(verbose, False)
    if text is None and not tasks:
        message = "nothing to measure: give --text FILE, --tasks TASK,TASK or both"
        raise RecipeError(message)
    if tokens is not None and tokens < window:
        message = f"--tokens {tokens} does not fill one window of {window}"
        raise RecipeError(message)
    needs("--text", text, {"--original": original, "--tokens": tokens})
    needs("--tasks", tasks or None, {"--tasks-folder": tasks_folder, "--limit": limit})
    wanted = _Wanted(
        text,
        window,
        tokens,
        read_tasks(tasks, tasks_folder, limit),
        limit,
        original,
        tokenizer,
        threads,
        trust_pickle,
    )
    with listening(settings.verbosity) as progress:
        found = _evaluate(models, wanted, progress)
    if as_json:
        for evaluation in found:
            click.echo(json.dumps(evaluation.to_dict()))
        return

    from fptq_compiler.cli.evaluate_text import evaluation_table, perplexity_line
    from fptq_compiler.cli.tables import stdout_console

    if tasks or original is not None:
        stdout_console().print(evaluation_table(found))
        return
    for evaluation in found:
        click.echo(perplexity_line(evaluation, window))


def needs(option: str, value: object, others: dict[str, object]) -> None:
    """Refuses options that say something about another one which was not given.

    Raises:
        RecipeError: naming both.
    """
    for name, other in others.items():
        if value is None and other is not None:
            message = f"{name} belongs to {option}, which was not given"
            raise RecipeError(message)


def read_tasks(names: Sequence[str], folder: Path | None, limit: int | None) -> tuple[Task, ...]:
    """Reads the questions of all tasks, before any model is opened.

    Raises:
        RecipeError: nobody said where their files lie.
        CaptureError: a file is missing, or not as expected.
    """
    if not names:
        return ()
    if folder is None:
        message = "--tasks needs the folder where their files lie: give --tasks-folder DIR"
        raise RecipeError(message)
    return tuple(read_task(name, folder, limit) for name in names)


@dataclass(frozen=True)
class _Wanted:
    """What is measured of each model."""

    text: Path | None
    window: int
    tokens: int | None
    tasks: tuple[Task, ...]
    limit: int | None
    original: Path | None
    tokenizer: Path | None
    threads: int | None
    trust_pickle: bool


def _evaluate(models: Sequence[Path], wanted: _Wanted, progress: Progress) -> list[Evaluation]:
    """Measures one model after the other; only the original stays open."""
    from fptq_compiler.closeness import Comparison
    from fptq_compiler.evaluation import Evaluation
    from fptq_compiler.perplexity import perplexity
    from fptq_compiler.tasks.evaluate import evaluate_task
    from fptq_compiler.text import load_tokenizer, token_stream

    reference, tokenizer_of_original = None, None
    if wanted.original is not None:
        reference, tokenizer_of_original = _open(wanted.original, wanted)

    def evaluate(model: Path) -> Evaluation:
        logits, beside = _open(model, wanted)
        chosen = wanted.tokenizer or beside or tokenizer_of_original
        if chosen is None:
            message = f"{model} has no tokenizer beside it: say where one is with --tokenizer"
            raise CaptureError(message)
        tokenizer = load_tokenizer(chosen)
        on_text = None
        comparison = Comparison(reference) if reference is not None else None
        if wanted.text is not None:
            stream = token_stream(wanted.text, tokenizer, wanted.tokens)
            on_text = perplexity(
                logits, stream, wanted.window, wanted.tokens, progress, comparison
            )
        return Evaluation(
            model=model.name,
            text=wanted.text.name if wanted.text is not None else None,
            perplexity=on_text,
            original=wanted.original.name if wanted.original is not None else None,
            closeness=comparison.result() if comparison is not None else None,
            limit=wanted.limit,
            tasks=tuple(evaluate_task(logits, tokenizer, t, progress) for t in wanted.tasks),
        )

    return [evaluate(model) for model in models]


def _open(model: Path, wanted: _Wanted) -> tuple[LogitsFunction, Path | None]:
    return open_model(model, trust_pickle=wanted.trust_pickle, threads=wanted.threads)


def open_model(
    model: Path, *, trust_pickle: bool, threads: int | None
) -> tuple[LogitsFunction, Path | None]:
    """Opens what is to be evaluated.

    Returns:
        Its logits function, and where its tokenizer is, if anywhere.

    Raises:
        CaptureError: it cannot be read.
    """
    if model.suffix.lower() == ".onnx":
        from fptq_compiler.perplexity import ort_logits

        has_tokenizer = any((model.parent / name).is_file() for name in _TOKENIZER_FILES)
        return ort_logits(model, threads), model.parent if has_tokenizer else None

    from fptq_compiler import driver

    return driver.original_logits(model, trust_pickle=trust_pickle)


def main() -> None:
    """Runs `fptq-eval`."""
    sys.exit(run(command))


if __name__ == "__main__":
    main()
