"""`fptq-eval`: perplexity of an ONNX file through ONNX Runtime, or of the original model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fptq_compiler.cli.console import listening
from fptq_compiler.cli.entry import EXIT_CODES, Settings, run, version_text
from fptq_compiler.errors import CaptureError, RecipeError

if TYPE_CHECKING:
    from fptq_compiler.perplexity import LogitsFunction

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@click.command(name="fptq-eval", epilog=EXIT_CODES)
@click.argument("model", metavar="MODEL.onnx|MODEL", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="UTF-8 text, tokenised once as a whole and cut into windows.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR|FILE",
    help="Tokenizer, where none lies beside the ONNX file and the model brings none.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    metavar="T",
    help="Tokens of each forward pass; windows do not overlap.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="Take the first N tokens only; without it the whole text.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of ONNX Runtime within one operator.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of words.")
@click.option("--trust-pickle", is_flag=True, help="Read a model that is, or holds, a pickle.")
@click.option("-v", "--verbose", is_flag=True, help="The log and tracebacks.")
@click.version_option(version_text(), message="%(version)s")
@click.pass_obj
def command(
    settings: Settings,
    *,
    model: Path,
    text: Path,
    tokenizer: Path | None,
    window: int,
    tokens: int | None,
    threads: int | None,
    as_json: bool,
    trust_pickle: bool,
    verbose: bool,
) -> None:
    """Measure the perplexity of a model on a text.

    A file that ends in .onnx runs in ONNX Runtime on the CPU; anything else is read as
    fptq-compile reads it and runs as it was, unquantised. Each window predicts all its
    tokens but the first; a shorter rest at the end is left out.
    """
    settings.set(verbose, False)
    if tokens is not None and tokens < window:
        message = f"--tokens {tokens} does not fill one window of {window}"
        raise RecipeError(message)

    from fptq_compiler.perplexity import perplexity
    from fptq_compiler.text import load_tokenizer, token_stream

    with listening(settings.verbosity) as progress:
        logits, beside = open_model(model, trust_pickle=trust_pickle, threads=threads)
        chosen = tokenizer or beside
        if chosen is None:
            message = f"{model} has no tokenizer beside it: say where one is with --tokenizer"
            raise CaptureError(message)
        stream = token_stream(text, load_tokenizer(chosen), tokens)
        result = perplexity(logits, stream, window, tokens, progress)
    if as_json:
        click.echo(json.dumps({"model": model.name, "text": text.name, **result.to_dict()}))
        return
    click.echo(
        f"perplexity {result.perplexity:.2f} ({result.nll:.4f} nats a token) of {model.name} on "
        f"{result.tokens} tokens in {result.windows} windows of {window}, {result.seconds:.1f} s"
    )


def open_model(
    model: Path, *, trust_pickle: bool, threads: int | None
) -> tuple[LogitsFunction, Path | None]:
    """Opens what is to be evaluated.

    Returns:
        Its logits function, and where its tokenizer is, if anywhere.

    Raises:
        CaptureError: it cannot be read.
    """
    if model.suffix.lower() == ".onnx":
        from fptq_compiler.perplexity import ort_logits

        has_tokenizer = any((model.parent / name).is_file() for name in _TOKENIZER_FILES)
        return ort_logits(model, threads), model.parent if has_tokenizer else None

    from fptq_compiler import driver

    return driver.original_logits(model, trust_pickle=trust_pickle)


def main() -> None:
    """Runs `fptq-eval`."""
    sys.exit(run(command))


if __name__ == "__main__":
    main()
