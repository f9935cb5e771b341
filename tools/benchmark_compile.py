"""What a compilation costs: seconds and peak memory by stage, and how they grow.

    python3 tools/benchmark_compile.py                      synthetic models, layers and width
    python3 tools/benchmark_compile.py --model model.gguf   one real model

Every model is compiled by the command in a process of its own, so that a peak is that model's.
Synthetic models are Llamas with random weights and SmolLM2's shapes, scaled. The floor beside
the peak is the float32 weights themselves, which a compilation must hold at least once.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

VOCABULARY = 49_152
TOKENS = (8, 256)


def synthetic(folder: Path, layers: int, width: int, vocabulary: int) -> Path:
    """A Hugging Face folder of a random Llama: SmolLM2 has 30 layers of width 576."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 3, head_dim=64,
        vocab_size=vocabulary, tie_word_embeddings=True,
    )
    path = folder / f"llama_{layers}x{width}"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def measure(
    model: Path, calibration: Path, folder: Path, bits: str, options: str
) -> dict[str, Any]:
    """The report of one compilation in a process of its own."""
    report = folder / "report.json"
    command = [
        sys.executable, "-m", "fptq_compiler", str(model), "-o", str(folder / "out.onnx"),
        "--bits", bits, "--calibration", str(calibration), "--report", str(report), "-q",
        *shlex.split(options),
    ]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Seconds a stage, one model a column, then peaks and their ratio to the weights."""
    table = Table("stage", *rows, title=title)
    stages = [s["name"] for s in next(iter(rows.values()))["stages"]]
    for stage in stages:
        cells = []
        for report in rows.values():
            row = next(s for s in report["stages"] if s["name"] == stage)
            cells.append(f"{row['seconds']:.1f} s, {row['peak_rss_mb']:,.0f} MB")
        table.add_row(stage, *cells)
    totals = [sum(s["seconds"] for s in r["stages"]) for r in rows.values()]
    peaks = [max(s["peak_rss_mb"] for s in r["stages"]) for r in rows.values()]
    floors = [r["size_before"] / 1e6 for r in rows.values()]
    table.add_section()
    table.add_row("all, seconds", *(f"{t:.0f}" for t in totals))
    table.add_row("peak, MB", *(f"{p:,.0f}" for p in peaks))
    table.add_row("float32 weights, MB (the floor)", *(f"{f:,.0f}" for f in floors))
    pairs = zip(peaks, floors, strict=True)
    table.add_row("peak over weights", *(f"{p / f:.2f}" for p, f in pairs))
    Console().print(table)


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path))
@click.option("--bits", default="4-8-8", show_default=True)
@click.option("--layers", default="8,16,30", show_default=True)
@click.option("--widths", default="384,576,960", show_default=True)
@click.option(
    "--fixed", default="8,576", show_default=True, help="Layers and width of the other series."
)
@click.option("--options", default="", help="Further words for fptq-compile, in one string.")
@click.option("--vocabulary", default=VOCABULARY, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: Path | None, bits: str, layers: str, widths: str, fixed: str, options: str,
    vocabulary: int, json_path: Path | None,
) -> None:
    """Measure one model, or the two series."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = folder / "ids.npy"
        np.save(calibration, np.random.default_rng(0).integers(0, vocabulary, TOKENS))
        if model is not None:
            results["one model"] = {model.name: measure(model, calibration, folder, bits, options)}
        else:
            few, narrow = map(int, fixed.split(","))
            depth = {f"{n} layers": (n, narrow) for n in map(int, layers.split(","))}
            breadth = {f"width {w}": (few, w) for w in map(int, widths.split(","))}
            both = {f"layers, at width {narrow}": depth, f"width, at {few} layers": breadth}
            seen: dict[tuple[int, int], dict[str, Any]] = {}
            for title, series in both.items():
                results[title] = {}
                for label, shape in series.items():
                    if shape not in seen:
                        made = synthetic(folder, *shape, vocabulary)
                        seen[shape] = measure(made, calibration, folder, bits, options)
                    results[title][label] = seen[shape]
    for title, rows in results.items():
        show(title, rows)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
