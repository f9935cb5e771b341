"""`fptq-inspect`: says what the compiler finds in a model, without compiling it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fptq_compiler.cli.console import listening
from fptq_compiler.cli.entry import EXIT_CODES, Settings, run, version_text


@click.command(name="fptq-inspect", epilog=EXIT_CODES)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--graph",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html|.svg",
    help="Draw the model, as the default recipe would compile it: blocks, sites, transforms, "
    "quantisers. The file needs no network and no script.",
)
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Read a model that is, or holds, a pickle. A pickle runs code: only from someone "
    "you trust.",
)
@click.option(
    "--example-inputs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Token ids (.npy) [batch, sequence] to capture a pickled module with.",
)
@click.option("-v", "--verbose", is_flag=True, help="The log, every site, and tracebacks.")
@click.version_option(version_text(), message="%(version)s")
@click.pass_obj
def command(
    settings: Settings,
    *,
    model: Path,
    as_json: bool,
    graph: Path | None,
    trust_pickle: bool,
    example_inputs: Path | None,
    verbose: bool,
) -> None:
    """Print what is found in MODEL.

    For each site what was recognised, which transforms apply, and for each that does not the
    reason, with the node and the line of the model's own code. Then the parts that were not
    recognised, and what that means for the file.
    """
    settings.set(verbose, False)

    from fptq_compiler import driver
    from fptq_compiler.cli.inspect_text import print_inspection
    from fptq_compiler.cli.tables import stdout_console

    with listening(settings.verbosity):
        found = driver.inspect_file(
            model, trust_pickle=trust_pickle, example_inputs=example_inputs, graph=graph
        )
    if as_json:
        click.echo(found.to_json())
    else:
        print_inspection(stdout_console(), found, every=verbose)


def main() -> None:
    """Runs `fptq-inspect`."""
    sys.exit(run(command))
