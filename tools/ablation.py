"""What each transform, and each setting, is worth: perplexity of the quantised model on real text.

    python3 tools/ablation.py MODEL --text FILE --calibration FILE --bits 4-8-8,4-4-4

Rows are sets of transforms (--cases: each alone, all but each, all) or settings of the recipe, as
in --cases "" --steps 24 --vary "both:" --vary "ranges only: training.transforms_rate=0". The
frozen program itself is evaluated; its codes are those of the ONNX file (every compilation checks
that), so the figures are the file's, without the time of lowering fourteen times.
"""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fptq_compiler.calibration import training_rows
from fptq_compiler.capture import capture
from fptq_compiler.closed_config import read_record
from fptq_compiler.perplexity import perplexity
from fptq_compiler.recipe import TRANSFORMS, Recipe, load_recipe
from fptq_compiler.stages import take_in, vocabulary_of
from fptq_compiler.text import load_calibration, load_tokenizer, token_stream
from fptq_compiler.trial import freeze


def cases(which: str) -> dict[str, str]:
    """Label to the words of --transforms."""
    everything = ",".join(TRANSFORMS)
    found = {"none": "none", "all": everything}
    for name in TRANSFORMS:
        found[f"{name} alone"] = name
        found[f"all but {name}"] = ",".join(t for t in TRANSFORMS if t != name)
    found["Hadamards"] = "residual,value,hadamard"
    found["Hadamards + scaling"] = "residual,value,hadamard,scaling"
    return found if which == "table" else {w: found[w] for w in which.split(";") if w}


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--bits", default="4-8-8,4-4-4", show_default=True)
@click.option("--recipe", "recipe_name", default="fptquant-local", show_default=True)
@click.option("--steps", default=0, show_default=True, help="Of end-to-end training.")
@click.option("--window", default=512, show_default=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option(
    "--cases", "which", default="table", show_default=True, help="Labels, with ; between."
)
@click.option(
    "--vary", "variants", multiple=True, metavar="LABEL: FIELD=VALUE …",
    help="A further row, the recipe with these fields.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, help="A recipe field, as local.steps=0.")
def main(
    model: Path, text: Path, calibration: Path, bits: str, recipe_name: str, steps: int,
    window: int, tokens: int, which: str, variants: tuple[str, ...], json_path: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Print the table, and write it as JSON where asked."""
    captured = capture(model)
    original = take_in(captured.program)
    tokenizer = load_tokenizer(captured.tokenizer or model)
    stream = token_stream(text, tokenizer, tokens)
    recipe = changed(load_recipe(recipe_name).override(verify="off", steps=steps), settings)
    vocabulary = vocabulary_of(original)
    ids = load_calibration(
        calibration, tokenizer=tokenizer, samples=recipe.calibration.samples,
        length=recipe.calibration.length, vocabulary=vocabulary,
    ).ids
    rows = None
    if recipe.trains:
        rows = training_rows(calibration, captured.tokenizer or model, recipe, vocabulary, ids)
    recipes = {label: recipe.override(transforms=w) for label, w in cases(which).items()}
    for variant in variants:
        label, _, fields = variant.partition(":")
        recipes[label] = changed(recipe, tuple(fields.split()))
    console, widths = Console(), bits.split(",")
    exact = perplexity(original.run, stream, window, tokens).perplexity
    console.print(f"original: {exact:.2f}")
    found: dict[str, list[float]] = {}
    for label, chosen in recipes.items():
        started = time.perf_counter()
        found[label] = []
        for setting in widths:
            program = original.copy()
            freeze(program, chosen.override(bits=setting), ids, rows)
            found[label].append(perplexity(program.run, stream, window, tokens).perplexity)
        words = ", ".join(f"{w}: {v:,.2f}" for w, v in zip(widths, found[label], strict=True))
        console.print(f"{label}: {words} ({time.perf_counter() - started:.0f} s)")
        if json_path is not None:
            json_path.write_text(json.dumps({"original": exact, "bits": widths, "rows": found}))
    table = Table("row", *(f"perplexity at {w}" for w in widths))
    for label, values in found.items():
        table.add_row(label, *(f"{v:,.1f}" for v in values))
    console.print(table)


def changed(recipe: Recipe, settings: tuple[str, ...]) -> Recipe:
    """The recipe with `part.field=value` settings in it, the values as TOML or plain words."""
    table = tomllib.loads(recipe.to_toml())
    for setting in settings:
        path, _, value = setting.partition("=")
        part, _, name = path.partition(".")
        try:
            table.setdefault(part, {})[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[part][name] = value
    return read_record(Recipe, table)


if __name__ == "__main__":
    main()
