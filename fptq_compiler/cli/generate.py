"""`fptq-generate`: a prompt continued by an ONNX file, the text shown as it is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from fptq_compiler.cli.console import listening
from fptq_compiler.cli.entry import EXIT_CODES, Settings, run, version_text
from fptq_compiler.errors import CaptureError, RecipeError

if TYPE_CHECKING:
    from fptq_compiler.runtime.continuation import Continuation

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
)


@click.command(name="fptq-generate", epilog=EXIT_CODES)
@click.argument(
    "model",
    metavar="OUT.onnx",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--prompt", metavar="TEXT", help="What to continue.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    metavar="DIR|FILE",
    help="Tokenizer, where none lies beside the ONNX file.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="The most tokens to generate; an end-of-text token ends earlier.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="T",
    help="Divides the logits; 0 takes the likeliest token each time.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="K",
    help="Draw from the K likeliest tokens.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=1.0,
    show_default=True,
    metavar="P",
    help="Draw from the smallest set of tokens with this probability together.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the draws.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Take the prompt for a user's message, by the tokenizer's chat template.",
)
@click.option(
    "--provider",
    metavar="NAME",
    help="Execution provider of ONNX Runtime, such as cpu or cuda, in place of the session "
    "file's.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads of ONNX Runtime within one operator.",
)
@click.option(
    "--genai-folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Generate nothing; write a folder that onnxruntime-genai opens.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end instead of the text.")
@click.option("-v", "--verbose", is_flag=True, help="The log and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but the text and errors.")
@click.version_option(version_text(), message="%(version)s")
@click.pass_obj
def command(
    settings: Settings,
    *,
    model: Path,
    prompt: str | None,
    tokenizer: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    chat: bool,
    provider: str | None,
    threads: int | None,
    genai_folder: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Continue a prompt with a compiled model, in ONNX Runtime.

    The text appears as it is made. With a KV cache each token costs one step; without one the
    whole sequence runs again for each.

    Example: fptq-generate model.onnx --prompt "The capital of France is" --tokenizer DIR
    """
    settings.set(verbose, quiet)
    if (prompt is None) == (genai_folder is None):
        message = "give either --prompt TEXT or --genai-folder DIR"
        raise RecipeError(message)

    from fptq_compiler.runtime.continuation import follow
    from fptq_compiler.runtime.genai import write_genai_folder
    from fptq_compiler.runtime.generate import generate
    from fptq_compiler.runtime.session import load
    from fptq_compiler.runtime.text_stream import TextStream
    from fptq_compiler.text import load_tokenizer

    with listening(settings.verbosity):
        codec = load_tokenizer(tokenizer or tokenizer_beside(model))
        if prompt is None:
            assert genai_folder is not None
            write_genai_folder(model, genai_folder, codec)
            if not quiet:
                click.echo(f"wrote {genai_folder}")
            return
        runtime = load(model, provider=provider, threads=threads)
        ids = prompt_ids(codec, prompt, chat=chat, start=runtime.settings.bos_token_id)
        tokens = generate(
            runtime,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=runtime.settings.eos_token_ids or listed(codec.eos_token_id),
        )
        result = follow(tokens, TextStream(codec, ids), silent if as_json else show)
    if as_json:
        click.echo(as_json_text(model, len(ids), result))
        return
    click.echo()
    if not quiet:
        full = len(ids) + len(result.tokens) == runtime.context_length
        click.echo(summary(len(ids), result, full=full), err=True)


def tokenizer_beside(model: Path) -> Path:
    """Finds the tokenizer in the model's folder.

    Raises:
        CaptureError: there is none.
    """
    if not any((model.parent / name).is_file() for name in _TOKENIZER_FILES):
        message = f"{model} has no tokenizer beside it: say where one is with --tokenizer"
        raise CaptureError(message)
    return model.parent


def prompt_ids(codec: Any, prompt: str, *, chat: bool, start: int | None) -> list[int]:
    """Gives the prompt's token ids, with the special tokens that the tokenizer adds.

    Args:
        codec: a transformers tokenizer.
        prompt: text, or with `chat` a user's message.
        chat: apply the tokenizer's chat template.
        start: the token that begins a text, which an empty prompt becomes.

    Raises:
        RecipeError: a chat is asked for, and the tokenizer has no template.
        CaptureError: the template fails.
    """
    if not chat:
        ids = codec(prompt, verbose=False)["input_ids"]
        return list(ids) or listed(start)
    if not codec.chat_template:
        message = "--chat: the tokenizer has no chat template; give the prompt without --chat"
        raise RecipeError(message)
    messages = [{"role": "user", "content": prompt}]
    try:
        text = codec.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and raises what it likes
        message = f"--chat: the tokenizer's chat template fails: {error}"
        raise CaptureError(message) from error
    return list(codec(text, add_special_tokens=False, verbose=False)["input_ids"])


def listed(token: int | None) -> list[int]:
    """Gives the token in a list, or an empty list."""
    return [] if token is None else [token]


def show(text: str) -> None:
    """Prints a piece of text at once."""
    click.echo(text, nl=False)


def silent(text: str) -> None:
    """Prints nothing."""


def summary(prompt_tokens: int, result: Continuation, *, full: bool) -> str:
    """Gives the line on speed, and says whether the context ended the text."""
    prompt_speed, decode_speed = result.speeds(prompt_tokens)
    parts = [
        f"prompt: {prompt_tokens} tokens{rate(prompt_speed)}",
        f"new: {len(result.tokens)} tokens{rate(decode_speed)}",
    ]
    return "; ".join([*parts, "the context is full"] if full else parts)


def rate(speed: float | None) -> str:
    """Gives a speed in words, or none."""
    return "" if speed is None else f", {speed:.1f} tokens/s"


def as_json_text(model: Path, prompt_tokens: int, result: Continuation) -> str:
    """Gives what --json prints."""
    prompt_speed, decode_speed = result.speeds(prompt_tokens)
    content: dict[str, Any] = {
        "model": model.name,
        "prompt_tokens": prompt_tokens,
        "tokens": result.tokens,
        "text": result.text,
        "prompt_tokens_per_second": prompt_speed,
        "decode_tokens_per_second": decode_speed,
    }
    return json.dumps(content)


def main() -> None:
    """Runs `fptq-generate`."""
    sys.exit(run(command))


if __name__ == "__main__":
    main()
