"""Each transform alone, all but each, and all: perplexity of the quantised model on real text.

    python3 tools/ablation.py MODEL --text FILE --calibration FILE --bits 4-8-8,4-4-4

The frozen program itself is evaluated; its codes are those of the ONNX file (every compilation
checks that), so the figures are the file's, without the time of lowering fourteen times.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fptq_compiler.capture import capture
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.perplexity import perplexity
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import TRANSFORMS, Recipe, load_recipe
from fptq_compiler.report import Report
from fptq_compiler.stages import quantize, transform, vocabulary_of
from fptq_compiler.text import load_calibration, load_tokenizer, token_stream


def cases(which: str) -> dict[str, str]:
    """Label to the words of --transforms."""
    everything = ",".join(TRANSFORMS)
    found = {"none": "none", "all": everything}
    for name in TRANSFORMS:
        found[f"{name} alone"] = name
        found[f"all but {name}"] = ",".join(t for t in TRANSFORMS if t != name)
    found["Hadamards"] = "residual,value,hadamard"
    found["Hadamards + scaling"] = "residual,value,hadamard,scaling"
    return found if which == "table" else {w: found[w] for w in which.split(";")}


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--bits", default="4-8-8,4-4-4", show_default=True)
@click.option("--recipe", "recipe_name", default="fptquant-local", show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option(
    "--cases", "which", default="table", show_default=True, help="Labels, with ; between."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, help="A recipe field, as local.steps=0.")
def main(
    model: Path, text: Path, calibration: Path, bits: str, recipe_name: str, window: int,
    tokens: int, which: str, json_path: Path | None, settings: tuple[str, ...],
) -> None:
    """Print the table, and write it as JSON where asked."""
    captured = capture(model)
    original = unlift(captured.program)
    tokenizer = load_tokenizer(captured.tokenizer or model)
    stream = token_stream(text, tokenizer, tokens)
    recipe = changed(load_recipe(recipe_name).override(verify="off"), settings)
    ids = load_calibration(
        calibration, tokenizer=tokenizer, samples=recipe.calibration.samples,
        length=recipe.calibration.length, vocabulary=vocabulary_of(original),
    ).ids
    console, widths = Console(), bits.split(",")
    exact = perplexity(original.run, stream, window, tokens).perplexity
    console.print(f"original: {exact:.2f}")
    rows: dict[str, list[float]] = {}
    for label, words in cases(which).items():
        started = time.perf_counter()
        folded = Program(copy.deepcopy(original.module), original.inputs)
        chosen = recipe.override(transforms=words)
        report, silent = Report(origin="ablation"), SilentProgress()
        transform(folded, chosen, ids, report, silent)
        rows[label] = []
        for setting in widths:
            program = replace(
                folded, module=copy.deepcopy(folded.module), facts=set(folded.facts),
                activation_quantizers=[], weight_quantizers=[],
            )
            quantize(program, chosen.override(bits=setting), ids, report, silent)
            rows[label].append(perplexity(program.run, stream, window, tokens).perplexity)
        words = ", ".join(f"{w}: {v:,.2f}" for w, v in zip(widths, rows[label], strict=True))
        console.print(f"{label}: {words} ({time.perf_counter() - started:.0f} s)")
        if json_path is not None:
            json_path.write_text(json.dumps({"original": exact, "bits": widths, "rows": rows}))
    table = Table("transforms", *(f"perplexity at {w}" for w in widths))
    for label, values in rows.items():
        table.add_row(label, *(f"{v:,.1f}" for v in values))
    console.print(table)


def changed(recipe: Recipe, settings: tuple[str, ...]) -> Recipe:
    """The recipe with `part.field=value` settings in it."""
    for setting in settings:
        path, _, value = setting.partition("=")
        part, _, name = path.partition(".")
        record = getattr(recipe, part)
        old = getattr(record, name)
        if isinstance(old, tuple):
            new: object = tuple(value.split("+"))
        else:
            new = (value == "true") if isinstance(old, bool) else type(old)(value)
        recipe = replace(recipe, **{part: replace(record, **{name: new})})
    return recipe


if __name__ == "__main__":
    main()
