"""What a compilation costs: seconds and peak memory by stage, and how they grow.

    python3 tools/benchmark_compile.py                      synthetic models, layers and width
    python3 tools/benchmark_compile.py --model model.gguf   one real model

Every model is compiled by the command in a process of its own, so that a peak is that model's.
Synthetic models are Llamas with random weights and SmolLM2's shapes, scaled, in bfloat16; with
--save-folder they are kept, and taken from there the next time. The floor beside the peak are the
weights in half precision and three blocks of them. Of the resident memory the anonymous part is
what the compiler holds; the rest are pages of files, libraries among them, which the system takes
back when it needs them. --check fails where memory or time do not grow as a line in the layers.
"""

from __future__ import annotations

import json
import math
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

VOCABULARY = 49_152
TOKENS = (8, 256)
HALF = 2  # bytes a value
BLOCKS = 3
GRAPH = 15.0  # megabytes of a layer's nodes, in Python, ONNX and a session: 12 are measured
BEND = 0.05  # of the largest value: how far a point may lie from the line through all
Row = dict[str, Any]


def synthetic(folder: Path, layers: int, width: int, vocabulary: int) -> Path:
    """A Hugging Face folder of a random Llama: SmolLM2 has 30 layers of width 576."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"llama_{layers}x{width}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 3, head_dim=64,
        vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(path)
    finally:
        torch.set_default_dtype(before)
    return path


def half_precision_bytes(model: Path) -> tuple[int, int]:
    """Of the weights of a folder, all and those of one block; zeros where there is no folder."""
    total = block = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as opened:
            for name in opened.offset_keys():
                size = math.prod(opened.get_slice(name).get_shape()) * HALF
                total += size
                block += size if ".layers.0." in name else 0
    return total, block


def processor_seconds() -> float:
    """Of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(model: Path, calibration: Path, folder: Path, bits: str, options: str) -> Row:
    """The report of one compilation in a process of its own, and what it used in all."""
    report = folder / "report.json"
    command = [
        sys.executable, "-m", "fptq_compiler", str(model), "-o", str(folder / "out.onnx"),
        "--bits", bits, "--calibration", str(calibration), "--report", str(report),
        "--quick-report", "-q",
        *shlex.split(options),
    ]
    before = processor_seconds()
    subprocess.run(command, check=True)
    found: Row = json.loads(report.read_text())
    found["processor_seconds"] = processor_seconds() - before
    found["half_precision"], found["block"] = half_precision_bytes(model)
    return found


def totals(report: Row) -> dict[str, float]:
    """Of one compilation: seconds, processor seconds, and peaks and floor in megabytes."""
    stages = report["stages"]
    return {
        "seconds": sum(s["seconds"] for s in stages),
        "processor seconds": report["processor_seconds"],
        "peak, MB": max(s["peak_rss_mb"] for s in stages),
        "anonymous peak, MB": max(s["peak_anonymous_mb"] for s in stages),
        "fp16 weights, MB": report["half_precision"] / 1e6,
        "fp16 weights and 3 blocks, MB": (
            report["half_precision"] + BLOCKS * report["block"]
        ) / 1e6,
        "file, MB": report["size_after"] / 1e6,
    }


def show(title: str, rows: Mapping[str, Row]) -> None:
    """Seconds and peaks (all, anonymous) a stage, one model a column, then the totals."""
    table = Table("stage: seconds, MB (anonymous)", *rows, title=title)
    stages = [s["name"] for s in next(iter(rows.values()))["stages"]]
    for stage in stages:
        cells = []
        for report in rows.values():
            row = next(s for s in report["stages"] if s["name"] == stage)
            memory = f"{row['peak_rss_mb']:,.0f} ({row['peak_anonymous_mb']:,.0f})"
            cells.append(f"{row['seconds']:.1f} s, {memory}")
        table.add_row(stage, *cells)
    table.add_section()
    columns = [totals(report) for report in rows.values()]
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:,.0f}" for column in columns))
    Console().print(table)


def growth(layers: list[int], reports: list[Row]) -> tuple[list[str], list[str]]:
    """How the totals grow with the layers, in words, and what is not as it should be."""
    words, wrong = [], []
    block = reports[0]["block"] / 1e6
    for name in ("processor seconds", "anonymous peak, MB"):
        values = np.array([totals(report)[name] for report in reports])
        slope, start = np.polyfit(layers, values, 1)
        bend = float(np.abs(start + slope * np.array(layers) - values).max() / values.max())
        words.append(f"{name}: {start:,.1f} and {slope:,.2f} a layer, within {bend:.0%}")
        if bend > BEND:
            wrong.append(f"{name} is no line in the layers: {bend:.0%} of the largest beside it")
        if name.endswith("MB") and slope > block + GRAPH:
            wrong.append(
                f"{slope:,.0f} MB a layer, expected at most the {block:,.0f} of its fp16 and "
                f"{GRAPH:.0f} of its graph"
            )
    words.append(f"fp16 weights of one layer: {block:,.2f} MB")
    return words, wrong


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
@click.option(
    "--save-folder", type=click.Path(path_type=Path), help="Keep synthetic models and files here."
)
@click.option("--check", is_flag=True, help="Fail where growth in layers is not as it should be.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: Path | None, bits: str, layers: str, widths: str, fixed: str, options: str,
    vocabulary: int, save_folder: Path | None, check: bool, json_path: Path | None,
) -> None:
    """Measure one model, or the two series."""
    results: dict[str, dict[str, Row]] = {}
    words: list[str] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = save_folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        calibration = folder / "ids.npy"
        np.save(calibration, np.random.default_rng(0).integers(0, vocabulary, TOKENS))
        if model is not None:
            results["one model"] = {model.name: measure(model, calibration, folder, bits, options)}
        else:
            few, narrow = map(int, fixed.split(","))
            counts = [int(n) for n in layers.split(",")]
            depth = {f"{n} layers": (n, narrow) for n in counts}
            breadth = {f"width {w}": (few, w) for w in map(int, widths.split(","))}
            both = {f"layers, at width {narrow}": depth, f"width, at {few} layers": breadth}
            seen: dict[tuple[int, int], Row] = {}
            for title, series in both.items():
                results[title] = {}
                for label, shape in series.items():
                    if shape not in seen:
                        made = synthetic(folder, *shape, vocabulary)
                        seen[shape] = measure(made, calibration, folder, bits, options)
                    results[title][label] = seen[shape]
            if len(counts) > 1:
                words, wrong = growth(counts, [seen[n, narrow] for n in counts])
    for title, rows in results.items():
        show(title, rows)
    for line in (*words, *wrong):
        Console().print(line)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))
    if check and wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
