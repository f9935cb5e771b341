"""Which model families compile, how far, and why not further: the README's table, from runs.

    python3 tools/compatibility.py                     every family, some 15 seconds each
    python3 tools/compatibility.py --only Llama        one
    python3 tools/compatibility.py --write             and replace the table in the README

Each family is a tiny transformers model with random weights, gains and biases. It is captured
with free batch and sequence; its sites are found; every transform is inserted where it applies
and the logits are compared in float64 with all maps off identity; it is quantised to 4-8-8,
lowered for ort-cpu and compared in ONNX Runtime code by code, without a cache and with one. What
fails on the way is the cell's reason.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from fptq_compiler.capture import capture  # noqa: E402
from fptq_compiler.cli.collapse import without_numbers  # noqa: E402
from fptq_compiler.cli.console import listening  # noqa: E402
from fptq_compiler.drawing.scene import SYMBOLS  # noqa: E402
from fptq_compiler.graph.evaluate import logits  # noqa: E402
from fptq_compiler.graph.pipeline import run_passes  # noqa: E402
from fptq_compiler.graph.program import Program  # noqa: E402
from fptq_compiler.graph.verify import off_identity, relative_error  # noqa: E402
from fptq_compiler.lower import lower  # noqa: E402
from fptq_compiler.passes import FIND_SITES, insertion  # noqa: E402
from fptq_compiler.progress import SilentProgress  # noqa: E402
from fptq_compiler.recipe import TRANSFORMS as RECIPE_TRANSFORMS  # noqa: E402
from fptq_compiler.recipe import (  # noqa: E402
    CacheRecipe,
    CalibrationRecipe,
    LocalRecipe,
    Recipe,
    TrainingRecipe,
)
from fptq_compiler.report import Report, write_text_whole  # noqa: E402
from fptq_compiler.runtime.session_file import SessionFile  # noqa: E402
from fptq_compiler.source_line import FRAME, SourceLine  # noqa: E402
from fptq_compiler.stages import cache, look_into, quantize, take_in, transform  # noqa: E402
from fptq_compiler.summary import KINDS, applied_transforms  # noqa: E402
from tests.real.architectures import ARCHITECTURES, ENCODERS, PIXELS  # noqa: E402
from tests.real.families import SIZES, VOCABULARY, Family, make_model  # noqa: E402

TRANSFORMS = {symbol: name for name, symbol in SYMBOLS.items()}
COLUMNS = (
    "captured", "sites", *TRANSFORMS, "preserved", "W4A8 parity", "KV cache",
)
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
LAYERS = int(SIZES["num_hidden_layers"])
PRESERVED = 1e-9
"""Relative, float64, off identity: a right rewrite shows 1e-15 to 1e-13, a wrong one over 1e-4."""

LONGEST = 32
"""Tokens of the cache."""

LONGEST_REASON = 200
LINE_NUMBER = re.compile(r"(?<=\.py):\d+(?= in )")
"""It moves with every release of the library whose code it is; the function stays."""

QUICK = Recipe(
    target="ort-cpu",
    local=LocalRecipe(steps=2),
    training=TrainingRecipe(steps=0),
    calibration=CalibrationRecipe(samples=2, length=32),
)


@dataclass(frozen=True)
class Cell:
    """What the table says, why it says no more, and the figure behind it."""

    text: str
    reason: str = ""
    figure: float | None = None


Row = dict[str, Cell]
NO_SITE = "no site has it"
NOT_REACHED = Cell("–")
NO_CACHE = Cell("–", "an encoder sees all tokens at once")
NO_FILE = Cell("–", "calibration and files are of models that take token ids")


class Encoder(nn.Module):
    """An encoder as a user would export it: its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Token ids (B, S) to (B, S, V), or pixels (B, C, H, W) to (B, classes)."""
        return self.model(given).logits


def exported(name: str, family: Family) -> ExportedProgram:
    """The family's program, with free batch and, where there are tokens, sequence."""
    model = make_model(family)
    if name not in ENCODERS:
        return capture(model).program
    example = pixels() if name == PIXELS else torch.arange(14).reshape(2, 7)
    free = {0: Dim.DYNAMIC} if name == PIXELS else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(Encoder(model), (example,), dynamic_shapes=(free,), strict=False)


@dataclass
class Run:
    """One family on its way: the cells so far."""

    name: str
    family: Family
    cells: Row = field(default_factory=lambda: dict.fromkeys(COLUMNS, NOT_REACHED))

    def attempt(self, column: str, work: Callable[[], Cell]) -> bool:
        """Fill one cell; a failure of any kind is its reason."""
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                self.cells[column] = work()
        except Exception as error:  # whatever fails is what the table has to say
            self.cells[column] = Cell("no", short(f"{error}" or type(error).__name__))
        gc.collect()
        return self.cells[column].text != "no"

    def all(self) -> Row:
        """Every cell."""
        if not self.attempt("captured", self._capture) or not self.attempt("sites", self._sites):
            return self.cells
        if self.name == PIXELS:
            self.attempt("preserved", self._transform_pixels)
            self.cells |= {"W4A8 parity": NO_FILE, "KV cache": NO_CACHE}
        elif self.attempt("preserved", self._transform):
            self.attempt("W4A8 parity", lambda: self._lower(cached=False))
            if self.name in ENCODERS:
                self.cells["KV cache"] = NO_CACHE
            else:
                self.attempt("KV cache", lambda: self._lower(cached=True))
        return self.cells

    def _capture(self) -> Cell:
        self._exported = exported(self.name, self.family)
        program = look_into(self._exported)
        fixed = [s.name for s in program.inputs if not isinstance(s.dims[0], str)]
        return Cell("no", f"the batch of {', '.join(fixed)} is fixed") if fixed else Cell("yes")

    def _sites(self) -> Cell:
        program = look_into(self._exported)
        run_passes(program, FIND_SITES)
        attention, mlp = len(program.sites.attention), len(program.sites.mlp)
        self._reasons = refusals(program)
        missing = []
        if attention < LAYERS:
            missing.append(reason_of(program, "attention") or "attention was not found")
        if mlp < LAYERS:
            missing.append("an MLP was not found")
        if program.sites.residual is None:
            missing.append(reason_of(program, "residual"))
        return Cell(f"{attention} + {mlp}", "; ".join(missing))

    def _transform(self) -> Cell:
        """Insert, verify off identity after every pass, optimise, fold."""
        program, report = take_in(self._exported), Report(origin=self.name)
        ids = tokens()
        transform(program, QUICK, ids, report, SilentProgress())
        self._transformed, self._ids = program, ids
        self._count(program)
        inserted = {k: v for k, v in report.preserved.items() if k not in ROUNDING}
        return self._preserved(max(inserted.values()))

    def _transform_pixels(self) -> Cell:
        """The same without calibration: insert, and compare off identity on one input."""
        program = look_into(self._exported)
        run_passes(program, FIND_SITES)
        expected = logits(program.module, [pixels()], torch.float64)
        places = QUICK.transforms.scaling_places
        run_passes(program, insertion(RECIPE_TRANSFORMS, seed=0, scaling_places=places))
        self._count(program)
        with torch.no_grad(), off_identity(program, 0):
            return self._preserved(
                relative_error(logits(program.module, [pixels()], torch.float64), expected)
            )

    def _count(self, program: Program) -> None:
        """At how many of its places each transform stands, and why not at the others."""
        self._reasons = refusals(program) | self._reasons
        applied = applied_transforms(program)
        for symbol, transform_name in TRANSFORMS.items():
            of = self._possible(program, transform_name)
            count = applied.get(transform_name, 0)
            reason = "" if count == of else self._reasons.get(transform_name) or NO_SITE
            self.cells[symbol] = Cell(f"{count}/{of}", reason)

    def _preserved(self, worst: float) -> Cell:
        if not worst <= PRESERVED:
            return Cell("no", f"relative error {worst:.0e} in float64", worst)
        return Cell("yes", "", worst)

    def _possible(self, program: Program, name: str) -> int:
        if name in KINDS["attention"]:
            return LAYERS
        return max(LAYERS, len(program.sites.mlp)) if name in KINDS["mlp"] else 1

    def _lower(self, *, cached: bool) -> Cell:
        """Quantise, write and compare; the failure of the comparison is an error."""
        recipe = replace(QUICK, cache=CacheRecipe(cached, LONGEST if cached else 0))
        program, report = take_in(self._exported, cached=cached), Report(origin=self.name)
        if cached:
            transform(program, replace(recipe, verify="off"), self._ids, report, SilentProgress())
        else:
            program = self._transformed
        quantize(program, recipe, self._ids, report, SilentProgress())
        if cached:
            cache(program, recipe, None, report)
        with tempfile.TemporaryDirectory() as folder:
            lower(
                program, Path(folder) / "model.onnx", recipe, report, probe=self._ids,
                force=False, language=SessionFile(), progress=SilentProgress(),
            )
        return Cell("yes")


ROUNDING = ("fold_transforms", "freeze_online", "carry_epsilon", "widen")
"""Passes that store new parameters in the weights' own type."""


def pixels() -> torch.Tensor:
    """Pictures (2, 3, 8, 8)."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    """Token ids (2, 32), for calibration and for the comparison."""
    return torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))


def refusals(program: Program) -> dict[str, str]:
    """For each transform the first reason why it does not apply somewhere."""
    sites = program.sites
    found: dict[str, str] = {}
    for site in (sites.residual, *sites.attention, *sites.mlp):
        for name, reason in (site.refused if site is not None else {}).items():
            found.setdefault(name, short(reason))
    if sites.residual is None:
        for name in KINDS["residual"]:
            found.setdefault(name, reason_of(program, "residual"))
    if not sites.attention:
        for name in KINDS["attention"]:
            found.setdefault(name, reason_of(program, "attention"))
    return found


def reason_of(program: Program, what: str) -> str:
    """The first near miss of that kind."""
    return next((short(m.reason) for m in program.near_misses if m.what == what), "")


def short(reason: str) -> str:
    """One line without numbers of nodes, folders, and lines of a library, for a footnote."""
    lines = FRAME.sub(lambda found: str(SourceLine.read(found[0])), reason)
    lines = LINE_NUMBER.sub("", lines)
    words = without_numbers(" ".join(lines.split())).replace("|", "/")
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]}…"


def row(name: str) -> Row:
    """The cells of one family, from a run."""
    return Run(name, ARCHITECTURES[name]).all()


def markdown(rows: Mapping[str, Row]) -> str:
    """The table, with a footnote for each reason."""
    notes: dict[str, int] = {}
    lines = [
        "| family | " + " | ".join(COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for name, cells in rows.items():
        words = [_shown(cells[column], notes) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def _shown(cell: Cell, notes: dict[str, int]) -> str:
    if not cell.reason:
        return cell.text
    number = notes.setdefault(cell.reason, len(notes) + 1)
    return f"{cell.text} ({number})"


def parse(text: str) -> dict[str, Row]:
    """The table that `markdown` wrote, with its reasons; figures are not in it."""
    lines = text.strip().splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    header = table[0][1:]
    rows: dict[str, Row] = {}
    for name, *words in table[2:]:
        cells = [_read(word, notes) for word in words]
        rows[name] = dict(zip(header, cells, strict=True))
    return rows


def _read(word: str, notes: Mapping[str, str]) -> Cell:
    text, _, note = word.partition(" (")
    return Cell(text, notes[note.rstrip(")")] if note else "")


def stands_in(readme: Path) -> str:
    """What stands between the two marks of the README.

    Raises:
        ClickException: the marks are not there.
    """
    _, found, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    inside, also, _ = rest.partition(END)
    if not found or not also:
        message = f"{readme.name} has no {BEGIN} and {END} to write the table between"
        raise click.ClickException(message)
    return inside


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="A family; several times for several.")
@click.option("--write", is_flag=True, help="Replace these families' rows in the README's table.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write cells as JSON.")
def main(only: tuple[str, ...], write: bool, json_path: Path | None) -> None:
    """Run the families and print the table."""
    unknown = [name for name in only if name not in ARCHITECTURES]
    if unknown:
        message = f"no family {unknown[0]!r}; there are {', '.join(ARCHITECTURES)}"
        raise click.ClickException(message)
    names = only or tuple(ARCHITECTURES)
    rows: dict[str, Row] = {}
    with listening(0) as progress:
        progress.start("families", len(names))
        for name in names:
            rows[name] = row(name)
            progress.advance(1, name)
        progress.done()
    click.echo(markdown(rows))
    if json_path is not None:
        content = {n: {c: asdict(cell) for c, cell in r.items()} for n, r in rows.items()}
        write_text_whole(json_path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if write:
        readme = REPOSITORY / "README.md"
        inside = stands_in(readme)
        before = parse(inside) if inside.strip() else {}
        whole = {n: rows.get(n) or before.get(n) for n in ARCHITECTURES}
        table = markdown({n: cells for n, cells in whole.items() if cells is not None})
        text = readme.read_text(encoding="utf-8")
        write_text_whole(readme, text.replace(inside, f"\n{table}", 1))


if __name__ == "__main__":
    main()
