"""FPTQuant and its neighbours side by side: accuracy, time, memory, size, work at run time.

    python3 tools/compare_methods.py MODEL --text FILE --calibration FILE --folder DIR

Every recipe is compiled at every setting by the command in a process of its own, and the file's
perplexity measured through ONNX Runtime. DIR gets methods.json and methods.md, and after a stop
the same command goes on there: what is finished for the same settings is not done again.
--steps N sets the length of every training; recipes without one stay without, unless a plus stands
behind the name, as in quarot+. Further words for fptq-compile go in one string, as in
--options "--samples 16".

--peers ort-rtn,nncf adds other tools' INT4 weights in blocks of 32 (see peers.py), to be read
beside --bits 4-16-16 of recipe files with [weights] block = 32. A tool with an environment of its
own is named with its Python, as in --peers ort-rtn,nncf=venv/bin/python. GGUF weights in blocks of
32 are on such a grid already, and rounded for nothing: take a model that is off it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from benchmark_compile import measure, totals

from fptq_compiler.bench.memory import measure_memory
from fptq_compiler.bench.result import Settings
from fptq_compiler.cli.console import listening
from fptq_compiler.cli.evaluate import open_model
from fptq_compiler.perplexity import perplexity
from fptq_compiler.recipe import BUILT_IN, TrainingRecipe, load_recipe
from fptq_compiler.report import write_text_whole
from fptq_compiler.runtime.model_file import read_model_file
from fptq_compiler.runtime.session_file import session_path
from fptq_compiler.text import load_tokenizer, token_stream

RECIPES = (
    "rtn,rtn-trained,smoothquant,smoothquant+,quarot,quarot+,spinquant,flatquant,fptquant-local,"
    "fptquant"
)
ORIGINAL, FLOAT, WEIGHT_ONLY = "original", "16-16-16", "4-16-16"
PEERS = Path(__file__).with_name("peers.py")
PEER_ROWS, PEER_TOKENS = 8, 256
"""Calibration rows for peers, and their tokens, as our recipes have them."""
COLUMNS = {
    "perplexity": "perplexity",
    "seconds": "seconds to compile",
    "compile_mb": "peak while compiling, MB",
    "session_mb": "peak of a session, MB",
    "online": "online multiply-adds a token",
    "file_mb": "file, MB",
}
Cell = dict[str, float]


class Results:
    """Finished cells by recipe and bits, kept in a JSON file for one set of settings."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Take up what the file has for the same settings."""
        self._path, self._settings = path, dict(settings)
        self.cells: dict[str, Cell] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.cells = kept["cells"] if kept["settings"] == self._settings else {}

    def find(self, recipe: str, bits: str, make: Callable[[], Cell]) -> Cell:
        """The cell, made and written if it is not finished."""
        name = f"{recipe} {bits}"
        if name not in self.cells:
            self.cells[name] = make()
            content = {"settings": self._settings, "cells": self.cells}
            write_text_whole(self._path, json.dumps(content, indent=1) + "\n")
        return self.cells[name]


def table(cells: Mapping[str, Cell]) -> str:
    """Markdown: a row for each recipe and setting."""
    lines = [
        "| recipe | bits W-A-KV | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name, cell in cells.items():
        figures = [_figure(key, cell.get(key)) for key in COLUMNS]
        lines.append("| " + " | ".join([*name.split(" "), *figures]) + " |")
    return "\n".join(lines) + "\n"


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if key == "perplexity" else f"{value:,.0f}"


def words_for(recipe: str, steps: int) -> str:
    """The words of fptq-compile that name a recipe, and the length of its training."""
    name = recipe.removesuffix("+")
    trains = name != recipe or load_recipe(name).training.steps > 0
    return f"--recipe {name} --steps {steps}" if trains else f"--recipe {name}"


def compiled(
    model: Path, calibration: Path, folder: Path, recipe: str, bits: str, steps: int, options: str
) -> Cell:
    """What one compilation costs and gives, without its perplexity; the file is out.onnx."""
    words = f"{words_for(recipe, steps)} {options}"
    report = measure(model, calibration, folder, bits, words)
    used = totals(report)
    memory = measure_memory(read_model_file(folder / "out.onnx"), Settings(threads=1))
    cell = {
        "seconds": used["seconds"],
        "compile_mb": used["peak, MB"],
        "online": float(report["online_operations"]),
        "file_mb": used["file, MB"],
    }
    return cell if memory is None else {**cell, "session_mb": memory.peak / 1e6}


def compressed(
    model: Path, calibration: Path, tokenizer: Path, folder: Path, peer: str, options: str
) -> Cell:
    """What another tool makes of the model in float, without its perplexity; as `compiled`."""
    name, _, python = peer.partition("=")
    original, ids = folder / "float" / "out.onnx", folder / "ids.npy"
    if not original.exists():
        words = f"{options} --recipe rtn --transforms none"
        original.parent.mkdir(exist_ok=True)
        measure(model, calibration, original.parent, FLOAT, words)
        stream = token_stream(calibration, load_tokenizer(tokenizer), PEER_ROWS * PEER_TOKENS)
        np.save(ids, stream.reshape(-1, PEER_TOKENS))
    started = time.perf_counter()
    target = folder / "out.onnx"
    words = [python or sys.executable, PEERS, name, original, target, ids]
    subprocess.run([str(word) for word in words], check=True)
    session_path(target).unlink(missing_ok=True)  # of another file, compiled under this name
    return {
        "seconds": time.perf_counter() - started, "online": 0.0,
        "file_mb": target.stat().st_size / 1e6,
    }


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--calibration", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option(
    "--recipes", default=RECIPES, show_default=True, help=f"Of {', '.join(BUILT_IN)}, or files."
)
@click.option("--bits", default="4-8-8,4-4-4", show_default=True)
@click.option(
    "--steps", default=TrainingRecipe.steps, show_default=True, help="Of the recipes that train."
)
@click.option("--peers", default="", metavar="NAME[=PYTHON],…", help="Other tools beside it.")
@click.option("--options", default="", help="Further words for fptq-compile, in one string.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path))
@click.option("--window", default=512, show_default=True)
@click.option("--tokens", default=4096, show_default=True)
def main(
    model: Path, text: Path, calibration: Path, folder: Path, recipes: str, bits: str,
    steps: int, peers: str, options: str, tokenizer: Path | None, window: int, tokens: int,
) -> None:
    """Fill the table, print it and keep it in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": model.name, "text": text.name, "calibration": calibration.name,
        "steps": steps, "options": options, "window": window, "tokens": tokens,
    }
    results = Results(folder / "methods.json", settings)
    stream = token_stream(text, load_tokenizer(tokenizer or model), tokens)

    def read(path: Path) -> float:
        logits, _ = open_model(path, trust_pickle=False, threads=1)
        return perplexity(logits, stream, window, tokens).perplexity

    def cell(recipe: str, setting: str) -> Cell:
        if recipe == ORIGINAL:
            return {"perplexity": read(model)}
        if recipe in others:
            found = compressed(
                model, calibration, tokenizer or model, folder, others[recipe], options
            )
        else:
            found = compiled(model, calibration, folder, recipe, setting, steps, options)
        return {"perplexity": read(folder / "out.onnx"), **found}

    others = {peer.partition("=")[0]: peer for peer in peers.split(",") if peer}
    wanted = [(ORIGINAL, FLOAT)]
    wanted += [(r, b) for r in recipes.split(",") if r for b in bits.split(",")]
    wanted += [(peer, WEIGHT_ONLY) for peer in others]
    with listening(0) as progress:
        progress.start("methods", len(wanted))
        for recipe, setting in wanted:
            results.find(recipe, setting, partial(cell, recipe, setting))
            progress.advance(1, f"{recipe} at {setting}")
        progress.done()
    words = table({f"{r} {s}": results.cells[f"{r} {s}"] for r, s in wanted})
    write_text_whole(folder / "methods.md", words)
    click.echo(words)


if __name__ == "__main__":
    main()
