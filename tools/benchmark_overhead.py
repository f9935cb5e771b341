"""What the online parts cost: one INT4 model with and without S_n and T_d, timed in turns.

    python3 tools/benchmark_overhead.py MODEL --calibration FILE --folder files --threads 2

Each variant is compiled into the folder, or taken from there. The transforms stay at their start,
untrained: training changes values, not the graph. Prints, for every prompt and context length,
the time over that of the variant without online parts, and the nodes that ran.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fptq_compiler.bench.model import open_model
from fptq_compiler.bench.result import Point, Settings, machine, spread, versions
from fptq_compiler.bench.run import kernels_of_model, time_points
from fptq_compiler.cli.console import listening
from fptq_compiler.driver import Options, compile_file
from fptq_compiler.errors import FptqError
from fptq_compiler.progress import Progress
from fptq_compiler.recipe import CacheRecipe, LocalRecipe, Recipe, TrainingRecipe
from fptq_compiler.runtime.model_file import ModelFile, read_model_file

MERGED = ("residual", "prerope", "value", "updown")
VARIANTS = {
    "without": MERGED,
    "S_n": (*MERGED, "scaling"),
    "T_d": (*MERGED, "hadamard"),
    "both": (*MERGED, "hadamard", "scaling"),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--calibration", type=click.Path(exists=True, path_type=Path))
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--bits", default="4-8-8", show_default=True)
@click.option("--target", default="ort-cpu", show_default=True)
@click.option("--prompt-lengths", default="32,128,512", show_default=True)
@click.option("--decode-at", default="128,1024", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: Path, calibration: Path | None, folder: Path, bits: str, target: str,
    prompt_lengths: str, decode_at: str, threads: int, repeats: int, json_path: Path | None,
) -> None:
    """Compile, time, print."""
    console = Console()
    settings = Settings(_numbers(prompt_lengths), _numbers(decode_at), 1, threads, None, repeats)
    recipe = Recipe(
        target=target, local=LocalRecipe(steps=0), training=TrainingRecipe(steps=0),
        cache=CacheRecipe(enabled=True),
    ).override(bits=bits)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with listening(0) as progress:
            files = {
                name: _compiled(model, folder / f"{bits}-{name}.onnx", recipe.override(
                    transforms=",".join(names)
                ), calibration, progress)
                for name, names in VARIANTS.items()
            }
            opened = {name: open_model(file, None, threads) for name, file in files.items()}
            points = list(time_points(opened, settings, progress))
            del opened
            nodes = {
                name: {kind: sum(row.count for row in rows)
                       for kind, rows in kernels_of_model(file, settings).items()}
                for name, file in files.items()
            }
    except FptqError as error:
        console.print(f"error: {error}", markup=False)
        raise SystemExit(error.exit_code) from error
    console.print(_table(points, nodes))
    if json_path is not None:
        found = {
            "bits": bits, "target": target, "nodes": nodes, "machine": machine(),
            "versions": versions(), "points": [point.to_dict() for point in points],
        }
        json_path.write_text(json.dumps(found, indent=1))


def _compiled(
    model: Path, path: Path, recipe: Recipe, calibration: Path | None, progress: Progress
) -> ModelFile:
    if not path.exists():
        options = Options(recipe=replace(recipe, verify="off"), calibration=calibration)
        compile_file(model, path, options, progress)
    return read_model_file(path)


def _table(points: list[Point], nodes: dict[str, dict[str, int]]) -> Table:
    table = Table("call", *(f"{name}, ms" for name in VARIANTS))
    for name in list(VARIANTS)[1:]:
        table.add_column(f"{name} costs", justify="right")
    for point in points:
        base = point.seconds["without"]
        cells = [f"{1e3 * point.latency(name).median:,.1f}" for name in VARIANTS]
        for name in list(VARIANTS)[1:]:
            pairs = zip(point.seconds[name], base, strict=True)
            cells.append(f"{spread([x / y for x, y in pairs]).median - 1:+.1%}")
        table.add_row(f"{point.kind} {point.length:,}", *cells)
    for kind in ("prefill", "decode"):
        table.add_row(f"nodes, {kind}", *(f"{nodes[name][kind]:,}" for name in VARIANTS))
    return table


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split(","))


if __name__ == "__main__":
    main()
