"""The one place where errors become exit codes, for every command.

0 done, 1 our bug, 2 usage or recipe, 3 model not supported, 4 verification failed, 5 lowering
failed, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Final

import click

from fptq_compiler.errors import FptqError, RecipeError

USAGE: Final = 2
OUR_BUG: Final = 1
INTERRUPTED: Final = 130
EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 our bug, 2 usage or recipe, 3 model not supported, 4 verification "
    "failed, 5 lowering failed, 130 interrupted."
)


@dataclass
class Settings:
    """How much the command says; `run` hands it to the command as click's `obj`.

    Attributes:
        verbosity: -1 errors only, 0 normal, 1 also the log and tracebacks.
        if_interrupted: what is said after Ctrl-C.
    """

    verbosity: int = 0
    if_interrupted: str = "nothing was written"

    def set(self, verbose: bool, quiet: bool) -> None:
        """Takes -v and -q.

        Raises:
            RecipeError: both were given.
        """
        if verbose and quiet:
            message = "-v and -q contradict each other"
            raise RecipeError(message)
        self.verbosity = int(verbose) - int(quiet)


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code; says on stderr what went wrong.

    Args:
        command: its context's `obj` will be a `Settings`.
        arguments: without the program's name; None takes the process's own.
    """
    settings = Settings()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(words, prog_name=command.name, standalone_mode=False, obj=settings)
    except FptqError as error:
        _trace(settings)
        _say(f"error: {error}")
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes it for a closed terminal
            return _bug(error.__cause__, settings)
        _say(f"interrupted: {settings.if_interrupted}")
        return INTERRUPTED
    except Exception as error:
        return _bug(error, settings)
    return code if isinstance(code, int) else 0


def version_text() -> str:
    """Gives the words of --version."""
    try:
        own = metadata.version("fptq-compiler")
    except metadata.PackageNotFoundError:
        own = "(not installed)"
    parts = []
    for name in ("torch", "onnx", "onnxruntime"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{name} is missing")
    return f"fptq-compiler {own} ({', '.join(parts)})"


def _bug(error: BaseException, settings: Settings) -> int:
    """Says that an exception that is no `FptqError` left the library."""
    _trace(settings)
    lines = str(error).splitlines() or ["no message"]
    hint = "" if settings.verbosity > 0 else " (run again with -v to see where)"
    _say(f"this is our bug, please report it: {type(error).__name__}: {lines[0]}{hint}")
    return OUR_BUG


def _trace(settings: Settings) -> None:
    """Shows where the exception in hand comes from, with -v."""
    if settings.verbosity > 0:
        _say(traceback.format_exc().rstrip())


def _say(text: str) -> None:
    click.echo(text, err=True)
