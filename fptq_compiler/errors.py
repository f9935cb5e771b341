"""The errors that a user can meet, each with the exit code of the command line.

Every message says what went wrong, where, what was expected and found, and what to do. An
exception that is not an `FptqError` is our bug and exits with 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class FptqError(Exception):
    """Base of all errors that are the user's to mend. `exit_code` is the command line's."""

    exit_code = 1


class RecipeError(FptqError):
    """The recipe or the command line asks for something that does not exist or contradicts."""

    exit_code = 2


class CaptureError(FptqError):
    """The model, tokenizer or calibration file cannot be read, or not safely."""

    exit_code = 3


class UnsupportedModelError(FptqError):
    """The graph was read but has no site for what the recipe demands.

    Attributes:
        near_misses: the closest candidates, one line each (node, reason, source line).
    """

    exit_code = 3

    def __init__(self, message: str, near_misses: Sequence[str] = ()) -> None:
        self.near_misses = tuple(near_misses)
        lines = [message, *(f"  near miss: {miss}" for miss in self.near_misses)]
        super().__init__("\n".join(lines))


class PassError(FptqError):
    """A pass was run without its facts, or left a graph that is not well formed."""

    exit_code = 1


class VerificationError(FptqError):
    """Something that must be equal is not: a rewrite, or the file against the program."""

    exit_code = 4


class OptimizationError(FptqError):
    """The optimiser met a value that is not finite, naming the site."""

    exit_code = 4


class RankError(FptqError):
    """Another process of the same training failed, or is gone; with that one's exit code."""

    def __init__(self, message: str, exit_code: int = FptqError.exit_code) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class LoweringError(FptqError):
    """The ONNX file could not be made, or not written."""

    exit_code = 5


class RuntimeLoadError(FptqError):
    """A compiled model cannot be opened: its file, weights, session file or provider."""

    exit_code = 3


class RuntimeInputError(FptqError):
    """A compiled model is asked for what it cannot run: ids, mask, cache, length, sampling."""

    exit_code = 2
