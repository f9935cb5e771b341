"""`fptq-bench`: speed, memory and kernels of one or two ONNX files in ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fptq_compiler.cli.console import listening
from fptq_compiler.cli.entry import EXIT_CODES, Settings, run, version_text
from fptq_compiler.errors import RecipeError

MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)


def lengths(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Reads positive numbers with commas between; each counts once, in ascending order.

    Raises:
        click.BadParameter: there is something else.
    """
    words = value.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        message = f"{value!r}: expected positive numbers with commas between"
        raise click.BadParameter(message, context, parameter)
    return tuple(sorted({int(word) for word in words}))


@click.command(name="fptq-bench", epilog=EXIT_CODES)
@click.argument("model", type=MODEL, metavar="A.onnx")
@click.option("--vs", type=MODEL, metavar="B.onnx", help="Model to compare A with.")
@click.option(
    "--prompt-lengths",
    callback=lengths,
    default="128,512",
    show_default=True,
    metavar="S,S",
    help="Tokens of each prefill, with nothing in the cache.",
)
@click.option(
    "--decode-at",
    callback=lengths,
    default="128,1024",
    show_default=True,
    metavar="P,P",
    help="Positions in the cache before each decode step.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="B",
    help="Sequences at once.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of ONNX Runtime within one operator.",
)
@click.option(
    "--provider",
    metavar="cpu|cuda|NAME",
    help="Execution provider of ONNX Runtime; without it what each session file says.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    metavar="N",
    help="Rounds; in each the models take turns.",
)
@click.option("--json", "json_file", type=NEW_FILE, metavar="FILE", help="Write all there is.")
@click.option(
    "--plot",
    type=NEW_FILE,
    metavar="FILE.png|.svg",
    help="Draw decode latency over context length; needs fptq-compiler[plot].",
)
@click.option("-v", "--verbose", is_flag=True, help="The log and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but errors.")
@click.version_option(version_text(), message="%(version)s")
@click.pass_obj
def command(
    settings: Settings,
    *,
    model: Path,
    vs: Path | None,
    prompt_lengths: tuple[int, ...],
    decode_at: tuple[int, ...],
    batch: int,
    threads: int | None,
    provider: str | None,
    repeats: int,
    json_file: Path | None,
    plot: Path | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Measure how fast a model runs in ONNX Runtime, and what it holds in memory.

    Prefill and decode steps are timed in rounds. With --vs the models take turns within each
    round, and the speed-up is the median of the ratios of the rounds: quote it rather than
    milliseconds, which depend on what else the machine does. A decode step runs on random
    keys and values. A model without a KV cache has prefill alone.

    Example: fptq-bench int4.onnx --vs float.onnx --decode-at 128,1024 --json bench.json
    """
    settings.set(verbose, quiet)
    check_folder("--json", json_file)
    check_folder("--plot", plot)

    from fptq_compiler.bench.plot import check_plot, plot_decode
    from fptq_compiler.bench.result import Settings as BenchSettings
    from fptq_compiler.bench.run import benchmark
    from fptq_compiler.cli.bench_tables import print_benchmark
    from fptq_compiler.cli.tables import stdout_console
    from fptq_compiler.runtime.model_file import read_model_file

    files = [read_model_file(path) for path in (model, vs) if path is not None]
    if plot is not None:
        check_plot(plot, files)
    wanted = BenchSettings(
        prompt_lengths=prompt_lengths,
        decode_at=decode_at,
        batch=batch,
        threads=threads,
        provider=provider,
        repeats=repeats,
    )
    with listening(settings.verbosity) as progress:
        result = benchmark(files, wanted, progress)
    if json_file is not None:
        result.write(json_file)
    if plot is not None:
        plot_decode(result, plot)
    if settings.verbosity >= 0:
        print_benchmark(stdout_console(), result)


def check_folder(option: str, path: Path | None) -> None:
    """Refuses a file in a folder that does not exist, before anything is measured.

    Raises:
        RecipeError: there is no such folder.
    """
    if path is not None and not path.parent.is_dir():
        message = f"{option} {path}: there is no folder {path.parent}"
        raise RecipeError(message)


def main() -> None:
    """Runs `fptq-bench`."""
    sys.exit(run(command))
