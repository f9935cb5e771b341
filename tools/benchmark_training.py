"""What end-to-end training costs beside plain fine-tuning of the same tokens, and how it grows.

    python3 tools/benchmark_training.py                      layers, width and tokens
    python3 tools/benchmark_training.py --cases 8x576x512    one case: layers x width x tokens

Each case is a random Llama with SmolLM2's shapes, scaled. In processes of their own, a step of
fptq-compile's end-to-end stage (teacher, quantised student, transforms, ranges) and one of plain
fine-tuning (forward and backward of all weights in float32, cross-entropy, Adam) run on the same
tokens and threads. Beside them stands the floor: 6 floating-point operations a weight and token
at the rate of this machine's own float32 product.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from benchmark_compile import synthetic
from rich.console import Console
from rich.progress import track
from rich.table import Table

SEQUENCES = 2
STEPS = 6
CASES = "4x576x512,8x576x512,16x576x512,8x384x512,8x960x512,8x576x1024,8x576x2048"
Row = dict[str, Any]


def ours(model: Path, ids: Path, folder: Path, tokens: int, options: str) -> Row:
    """Seconds of a step and peak memory of the stage, from the report of a compilation."""
    recipe, report = folder / "recipe.toml", folder / "report.json"
    recipe.write_text(
        f'verify = "off"\n[local]\nsteps = 1\n[training]\nsteps = {STEPS}\nheld_out = 1\n'
        f"batch = {SEQUENCES}\nlength = {tokens // SEQUENCES}\n",
        encoding="utf-8",
    )
    subprocess.run(
        [
            sys.executable, "-m", "fptq_compiler", str(model), "-o", str(folder / "out.onnx"),
            "--recipe", str(recipe), "--calibration", str(ids), "--report", str(report), "-q",
            "--samples", "2", "--sequence-length", "64", *shlex.split(options),
        ],
        check=True,
    )
    found = json.loads(report.read_text())
    stage = next(s for s in found["stages"] if s["name"] == "end-to-end training")
    return {
        "seconds": tokens / found["tokens_per_second"],
        "anonymous MB": stage["peak_anonymous_mb"],
    }


def plain(model: Path, ids: Path, tokens: int) -> Row:
    """The same of plain fine-tuning; run by `main` in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from fptq_compiler.stage_clock import StageClock

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    rows = torch.from_numpy(np.load(ids)).flatten()[:tokens].reshape(SEQUENCES, -1)
    seconds, clock_rows = [], []
    with StageClock("plain", clock_rows):
        for _ in range(STEPS):
            started = time.perf_counter()
            optimizer.zero_grad()
            network(rows, labels=rows).loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
    weights = sum(p.numel() for p in network.parameters())
    x = torch.ones(512, 1024)
    products = []
    for _ in range(5):
        started = time.perf_counter()
        x @ torch.ones(1024, 1024)
        products.append(time.perf_counter() - started)
    rate = 2 * 512 * 1024 * 1024 / min(products)
    return {
        "seconds": statistics.median(seconds),
        "anonymous MB": clock_rows[0].peak_anonymous_mb,
        "floor seconds": 6 * weights * tokens / rate,
    }


def in_a_process(model: Path, ids: Path, tokens: int) -> Row:
    """`plain`, measured where nothing else has used memory."""
    words = [sys.executable, __file__, "--plain", f"{model},{ids},{tokens}"]
    found: Row = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return found


@click.command()
@click.option("--cases", default=CASES, show_default=True, help="layers x width x tokens a step.")
@click.option("--vocabulary", default=49_152, show_default=True)
@click.option("--options", default="", help="Further words for fptq-compile, in one string.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--plain", "plain_case", hidden=True)
def main(
    cases: str, vocabulary: int, options: str, json_path: Path | None, plain_case: str | None
) -> None:
    """Measure every case, print the table."""
    if plain_case is not None:
        model, ids, tokens = plain_case.split(",")
        click.echo(json.dumps(plain(Path(model), Path(ids), int(tokens))))
        return
    rows: dict[str, dict[str, Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = folder / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, vocabulary, 1 << 15))
        for case in track(cases.split(","), "training", console=Console(stderr=True)):
            layers, width, tokens = map(int, case.split("x"))
            model = synthetic(folder, layers, width, vocabulary)
            rows[case] = {
                "ours": ours(model, ids, folder, tokens, options),
                "plain": in_a_process(model, ids, tokens),
            }
    table = Table("layers x width x tokens", "step, s", "plain, s", "times", "floor, s",
                  "memory, MB", "plain, MB", "times")
    for case, row in rows.items():
        own, other = row["ours"], row["plain"]
        table.add_row(
            case, f"{own['seconds']:.2f}", f"{other['seconds']:.2f}",
            f"{own['seconds'] / other['seconds']:.2f}", f"{other['floor seconds']:.2f}",
            f"{own['anonymous MB']:,.0f}", f"{other['anonymous MB']:,.0f}",
            f"{own['anonymous MB'] / other['anonymous MB']:.2f}",
        )
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
