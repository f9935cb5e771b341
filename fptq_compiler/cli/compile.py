"""`fptq-compile`: a model in, a quantised ONNX file out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from fptq_compiler.cli.console import listening
from fptq_compiler.cli.entry import EXIT_CODES, Settings, run, version_text
from fptq_compiler.errors import LoweringError, RecipeError
from fptq_compiler.memory import map_large_tensors
from fptq_compiler.recipe import (
    BUILT_IN,
    CACHE_SCALES,
    DEFAULT_RECIPE,
    DTYPES,
    NEIGHBOURS,
    ROUNDINGS,
    TARGETS,
    TRANSFORMS,
    VERIFY_LEVELS,
    load_recipe,
)

EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(name="fptq-compile", epilog=EXIT_CODES)
@click.argument("model", type=EXISTING)
@click.option(
    "-o", "--output", type=NEW_FILE, required=True, metavar="OUT.onnx", help="File to write."
)
@click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    show_default=True,
    metavar="NAME|FILE",
    help=f"Built-in recipe ({', '.join(BUILT_IN)}) or a TOML file. The options below override it.",
)
@click.option(
    "--bits",
    metavar="W-A-KV",
    help="Bits of weights, activations and KV cache, each 4, 8 or 16; 16 is not quantised. "
    "4-8-8 in the built-in recipes.",
)
@click.option(
    "--embedding-bits", type=int, metavar="4|8|16",
    help="Bits of the embedding table, a scale a row; 8 in the built-in recipes.",
)
@click.option(
    "--head-bits", type=int, metavar="4|8|16",
    help="Bits of the head, a scale an output channel; 8 in the built-in recipes.",
)
@click.option(
    "--rounding",
    metavar="|".join(ROUNDINGS),
    help="Of the weights of linears: to the nearest code, or by GPTQ, where each input channel "
    "makes up for the rounding of those before it on the calibration inputs, and training keeps "
    "the codes; auto (the default) takes the second for 4-bit weights where activations have 8 "
    "bits or more.",
)
@click.option(
    "--matmulnbits-accuracy-level", type=int, metavar="1|4",
    help="Of weight-only settings such as 4-16-16: 1 multiplies in float (the default), 4 "
    "quantises activations to INT8 on the fly, which is faster and not W4A16.",
)
@click.option(
    "--transforms",
    metavar="LIST|none|auto",
    help=f"Names with commas between, of {', '.join(TRANSFORMS)}, or {', '.join(NEIGHBOURS)}: "
    "each is demanded, and one without a site is an error. auto takes every one of FPTQuant's "
    "six that applies.",
)
@click.option(
    "--choose-transforms",
    "choose",
    is_flag=True,
    default=None,
    help="Try each transform, and S_n at each place, in a short training, then each at each site; "
    "keep what lowers the loss on held-out text.",
)
@click.option(
    "--calibration",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Token ids (.npy), rows (.jsonl) or text. Without it the model calibrates on text "
    "that it writes itself.",
)
@click.option(
    "--tokenizer",
    type=EXISTING,
    metavar="DIR|FILE",
    help="Tokenizer for text, where the model brings none.",
)
@click.option(
    "--kv-cache",
    is_flag=True,
    default=None,
    help="Give the file a KV cache: past keys and values in, present ones out, for generation.",
)
@click.option(
    "--max-length", type=int, metavar="N",
    help="Tokens that the cache may hold; the model's context, at most 8192, if not given.",
)
@click.option(
    "--kv-scales",
    metavar="|".join(CACHE_SCALES),
    help="Static scales of a quantised cache: one for the keys and one for the values of a "
    "layer, or one for each of their heads and channels.",
)
@click.option(
    "--steps", type=int, metavar="N",
    help="Steps of end-to-end training; 0 leaves it out.",
)
@click.option("--samples", type=int, metavar="N", help="Calibration sequences.")
@click.option("--sequence-length", type=int, metavar="T", help="Tokens of each.")
@click.option("--target", metavar="NAME", help=f"Form of the file: {', '.join(TARGETS)}.")
@click.option(
    "--dtype",
    metavar="|".join(DTYPES),
    help="What the file computes in where not in integers; auto is float16 for GPU targets, "
    "else float32.",
)
@click.option(
    "--verify",
    metavar="|".join(VERIFY_LEVELS),
    help="How much of each rewrite is proved by running it before and after. The written file "
    "is checked against ONNX Runtime at every level.",
)
@click.option("--seed", type=int, metavar="N", help="Seed of every random draw.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the transforms are trained and the model is calibrated.",
)
@click.option(
    "--work-dir", type=FOLDER, metavar="DIR", help="Keep intermediate results, to resume."
)
@click.option(
    "--report", type=NEW_FILE, multiple=True, metavar="FILE.html|FILE.json",
    help="Write the whole report, as a page or as data; may be given twice. It measures signal "
    "and noise by stage and the sensitivity of the blocks, which takes further runs.",
)
@click.option(
    "--quick-report", is_flag=True, help="Leave out of --report what takes further runs."
)
@click.option(
    "--dump-dir", type=FOLDER, metavar="DIR", help="Write the graph after each pass as text."
)
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Read a model that is, or holds, a pickle. A pickle runs code: only from someone "
    "you trust.",
)
@click.option(
    "--example-inputs",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Token ids (.npy) [batch, sequence] to capture a pickled module with.",
)
@click.option(
    "--force", is_flag=True, help="Write the file even if it fails the check, and say so."
)
@click.option("-v", "--verbose", is_flag=True, help="The log, every site, and tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but errors.")
@click.version_option(version_text(), message="%(version)s")
@click.pass_obj
def command(
    settings: Settings,
    *,
    model: Path,
    output: Path,
    recipe: str,
    bits: str | None,
    embedding_bits: int | None,
    head_bits: int | None,
    rounding: str | None,
    matmulnbits_accuracy_level: int | None,
    transforms: str | None,
    calibration: Path | None,
    tokenizer: Path | None,
    kv_cache: bool | None,
    max_length: int | None,
    kv_scales: str | None,
    steps: int | None,
    choose: bool | None,
    samples: int | None,
    sequence_length: int | None,
    target: str | None,
    dtype: str | None,
    verify: str | None,
    seed: int | None,
    device: str,
    work_dir: Path | None,
    report: tuple[Path, ...],
    quick_report: bool,
    dump_dir: Path | None,
    trust_pickle: bool,
    example_inputs: Path | None,
    force: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Compile MODEL to a quantised ONNX file that ONNX Runtime executes.

    MODEL is a torch.export archive (.pt, .pt2), a Hugging Face folder, a GGUF file, or with
    --trust-pickle a pickled module. Nothing is fetched from a network.

    Example: fptq-compile model.pt -o model.onnx --bits 4-8-8 --calibration text.txt
    """
    settings.set(verbose, quiet)
    settings.if_interrupted = how_to_go_on(work_dir)
    chosen = load_recipe(recipe).override(
        bits=bits,
        transforms=transforms,
        samples=samples,
        sequence_length=sequence_length,
        target=target,
        dtype=dtype,
        verify=verify,
        seed=seed,
        kv_cache=kv_cache,
        max_length=max_length,
        embedding_bits=embedding_bits,
        head_bits=head_bits,
        matmulnbits_accuracy_level=matmulnbits_accuracy_level,
        kv_scales=kv_scales,
        steps=steps,
        choose=choose,
        rounding=rounding,
    )
    check_output(model, output)
    check_device(device)

    from fptq_compiler import driver
    from fptq_compiler.cli.inspect_text import print_unrecognised, stderr_console
    from fptq_compiler.cli.tables import print_summary, stdout_console
    from fptq_compiler.processes import check_shares, device_of_process, joined, process_rank

    check_shares(chosen)
    first = process_rank() == 0
    if not first:
        settings.set(verbose=False, quiet=True)
    own_device = device_of_process(device)
    options = driver.Options(
        recipe=chosen,
        calibration=calibration,
        tokenizer=tokenizer,
        device=own_device,
        work_dir=work_dir,
        reports=report,
        quick_report=quick_report,
        dump_dir=dump_dir if first else None,
        force=force,
        trust_pickle=trust_pickle,
        example_inputs=example_inputs,
    )
    with joined(own_device), listening(settings.verbosity) as progress:
        result = driver.compile_file(model, output, options, progress)
    if settings.verbosity >= 0:
        if result.unrecognised:
            print_unrecognised(stderr_console(), result.unrecognised)
        print_summary(stdout_console(), result, str(output), every=verbose)


def check_output(model: Path, output: Path) -> None:
    """Refuses an output that could not be written, before hours are spent on it.

    Raises:
        RecipeError: its folder does not exist, or it is the model itself.
        LoweringError: its folder may not be written to.
    """
    if not output.parent.is_dir():
        message = f"-o {output}: there is no folder {output.parent}"
        raise RecipeError(message)
    if output.exists() and output.samefile(model):
        message = f"-o {output}: that is the model itself"
        raise RecipeError(message)
    if not os.access(output.parent, os.W_OK | os.X_OK):
        message = f"-o {output}: no permission to write to the folder {output.parent}"
        raise LoweringError(message)


def how_to_go_on(work_dir: Path | None) -> str:
    """What is said after Ctrl-C."""
    if work_dir is None:
        return "nothing was written; a compilation with --work-dir DIR goes on where it stood"
    return f"no model was written; the same command goes on from what {work_dir} holds"


def check_device(device: str) -> None:
    """Refuses a GPU that torch does not see.

    Raises:
        RecipeError: there is none.
    """
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        message = (
            f"--device cuda: torch {torch.__version__} sees no CUDA device; install a CUDA "
            "build of torch with a matching driver, or use --device cpu"
        )
        raise RecipeError(message)


def main() -> None:
    """Runs `fptq-compile`."""
    map_large_tensors()
    sys.exit(run(command))
