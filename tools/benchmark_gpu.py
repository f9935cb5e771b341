"""All checks of a GPU in one command: placement, parity, and speed beside its floor.

    python3 tools/benchmark_gpu.py model.gguf --folder files --json gpu.json
    python3 tools/benchmark_gpu.py --tiny --provider cpu --bandwidth 20 --tops 1 --int8-tops 4

Needs onnxruntime-gpu. For each setting a file is compiled into the folder, or taken from there;
it is checked that no matmul ran on the CPU and nothing was copied between devices, its logits
are compared with the frozen program's in torch, and it is timed in turns with the file that is
float throughout. Attention on caches and the matmuls of a 7B model's layer are timed by
themselves. The floor is the time that the memory or the tensor cores need at least.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import click
import numpy as np
from benchmark_compile import synthetic
from rich.console import Console
from rich.table import Table

from fptq_compiler import driver
from fptq_compiler.bench.against_floor import INTB, Row, attention_rows, matmul_rows, model_rows
from fptq_compiler.bench.devices import Device, device_of, gpu_name
from fptq_compiler.bench.operators import STREAMED
from fptq_compiler.bench.placement import misplaced
from fptq_compiler.bench.result import Settings, machine, versions
from fptq_compiler.bench.run import kernels_of_model
from fptq_compiler.cli.console import listening
from fptq_compiler.errors import FptqError
from fptq_compiler.progress import Progress, SilentProgress
from fptq_compiler.recipe import load_recipe
from fptq_compiler.recipe_parts import SHORTEST_CACHE
from fptq_compiler.runtime.model import Model
from fptq_compiler.runtime.model_file import ModelFile, read_model_file
from fptq_compiler.runtime.session import available_providers, open_session

FLOAT = "16-16-16"
SETTINGS = tuple(f"{w}-{kv}" for w in ("16-16", "4-16", "4-8", "4-4") for kv in (16, 8, 4))
MS = 1e3


@dataclass(frozen=True)
class Sizes:
    """Of the operators that are timed by themselves.

    Attributes:
        shapes: K and N of the matmuls.
        heads: of queries, of keys and values, and the width of each.
        streamed: bytes of weights in a graph for few rows.
    """

    shapes: tuple[tuple[int, int], ...] = (
        (4096, 4096), (4096, 11008), (11008, 4096), (4096, 12288),
    )
    heads: tuple[int, int, int] = (32, 8, 128)
    streamed: int = STREAMED


TINY = Sizes(shapes=((64, 96),), heads=(4, 2, 16), streamed=2**16)


@dataclass(frozen=True)
class Check:
    """What one file did.

    Attributes:
        elsewhere: kernels that ran on the CPU, and copies between devices; or why there is no
            file, or it does not run.
        apart: from the logits of the frozen program in torch, of the largest; None if not known.
        same: part of the positions whose likeliest token is the same.
    """

    elsewhere: tuple[str, ...]
    apart: float | None = None
    same: float | None = None

    @property
    def good(self) -> bool:
        """Whether it ran where it should, and gave numbers."""
        return not self.elsewhere and (self.apart is None or math.isfinite(self.apart))


def compiled(
    model: Path, folder: Path, bits: str, *, target: str, recipe: str, length: int
) -> ModelFile:
    """The file of a setting, made if it is not there, with the frozen program's logits beside."""
    path = folder / f"{bits}.onnx"
    if not path.is_file():
        chosen = load_recipe(recipe).override(
            bits=bits, target=target, kv_cache=True, max_length=length
        )
        options = driver.Options(recipe=chosen, reference=path.with_suffix(".npz"))
        driver.compile_file(model, path, options, SilentProgress())
    return read_model_file(path)


def with_intb(file: ModelFile) -> ModelFile:
    """The same file in a session with fpA_intB."""
    config = {**file.settings.session_config, **INTB}
    return replace(file, settings=replace(file.settings, session_config=config))


def check(file: ModelFile, settings: Settings) -> Check:
    """Run one prefill and one decode step, and the tokens of the reference."""
    kernels = kernels_of_model(file, settings)
    provider = settings.provider or ""
    elsewhere = tuple(
        f"{kind}: {words}" for kind, rows in kernels.items() for words in misplaced(rows, provider)
    )
    reference = file.path.with_suffix(".npz")
    if not reference.is_file():
        return Check(elsewhere)
    with np.load(reference) as stored:
        ids, expected = stored["ids"], stored["logits"]
    model = Model(open_session(file, provider, settings.threads), file.signature, file.settings)
    found, _ = model.step(ids, model.start(ids.shape[0]))
    apart = np.abs(found.astype(np.float32) - expected).max() / np.abs(expected).max()
    same = (found.argmax(-1) == expected.argmax(-1)).mean()
    return Check(elsewhere, float(apart), float(same))


def measure(
    files: Mapping[str, ModelFile], sizes: Sizes, rows: Sequence[int], settings: Settings,
    device: Device, progress: Progress,
) -> list[Row]:
    """Time the files, attention and matmuls."""
    found: list[Row] = []
    for label, file in files.items():
        found += model_rows(label, file, files[FLOAT], settings, device, progress)
    on_cpu = str(settings.provider).startswith("CPU")  # which has few kernels of float16
    dtype = np.dtype("float32" if on_cpu else "float16")
    calls = [(1, past) for past in settings.decode_at]
    calls += [(tokens, 0) for tokens in settings.prompt_lengths]
    for tokens, past in calls:
        found += attention_rows(tokens, past, sizes.heads, dtype, settings, device, progress)
    for inner, columns in sizes.shapes:
        for m in rows:
            shape = (m, inner, columns)
            found += matmul_rows(shape, dtype, settings, device, progress, sizes.streamed)
    return found


def checks_table(checks: Mapping[str, Check]) -> Table:
    """Where each file ran, and how near it is to the frozen program in torch."""
    table = Table(title="Checks", title_justify="left")
    for name in ("setting", "ran elsewhere", "logits apart", "same token"):
        table.add_column(name, overflow="fold")
    for label, found in checks.items():
        apart = "not known" if found.apart is None else f"{found.apart:.1e}"
        same = "" if found.same is None else f"{found.same:.0%}"
        table.add_row(label, "\n".join(found.elsewhere) or "nothing", apart, same)
    return table


def speed_table(rows: Sequence[Row], device: Device) -> Table:
    """Milliseconds of one call beside their floor."""
    limits = f"{device.bandwidth / 1e9:,.0f} GB/s, {device.float16 / 1e12:,g} x 10^12 a second"
    title = f"{device.name}: {limits} in float16, {device.int8 / 1e12:,g} in INT8"
    table = Table(title=title, title_justify="left")
    for name in ("call", "form"):
        table.add_column(name, overflow="fold")
    for name in ("ms", "floor, ms", "times the floor", "faster than float by"):
        table.add_column(name, justify="right")
    for _, group in groupby(rows, key=lambda row: row.what):
        for row in group:
            floor = f"{row.floor * MS:.3g}"
            if row.seconds is None:
                table.add_row(row.what, row.form, "no kernel", floor)
                continue
            faster = "" if row.faster is None else f"{row.faster:.2f}"
            times = f"{row.seconds / row.floor:.1f}"
            table.add_row(row.what, row.form, f"{row.seconds * MS:.3g}", floor, times, faster)
        table.add_section()
    return table


def numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    return tuple(int(word) for word in value.split(","))


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path), required=False)
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path),
    help="Where the files lie, as BITS.onnx, and are kept.",
)
@click.option("--settings", "wanted", default=",".join(SETTINGS), show_default=True)
@click.option("--target", default="ort-cuda", show_default=True)
@click.option("--recipe", default="rtn", show_default=True)
@click.option("--provider", default="cuda", show_default=True)
@click.option("--prompt-lengths", callback=numbers, default="128,512,2048", show_default=True)
@click.option("--decode-at", callback=numbers, default="128,1024,8192", show_default=True)
@click.option(
    "--rows", callback=numbers, default="1,16,128,2048", show_default=True, help="Of the matmuls."
)
@click.option("--repeats", default=7, show_default=True)
@click.option("--threads", type=int, help="Of ONNX Runtime on a CPU.")
@click.option("--bandwidth", type=float, help="GB/s of a device that is not in the table.")
@click.option("--tops", type=float, help="Its 10^12 operations a second in float16.")
@click.option("--int8-tops", type=float, help="Its 10^12 operations a second in INT8.")
@click.option("--tiny", is_flag=True, help="A random model and matmuls that take no time.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    model: Path | None, folder: Path | None, wanted: str, target: str, recipe: str,
    provider: str, prompt_lengths: tuple[int, ...], decode_at: tuple[int, ...],
    rows: tuple[int, ...], repeats: int, threads: int | None, bandwidth: float | None,
    tops: float | None, int8_tops: float | None, tiny: bool, json_path: Path | None,
) -> None:
    """Run every check, print the tables, and fail where a file ran elsewhere."""
    if model is None and not tiny:
        message = "give MODEL, or --tiny for a random one"
        raise click.UsageError(message)
    try:
        device = device_of(gpu_name(), bandwidth, tops, int8_tops)
        (full_name,) = available_providers([provider])
    except FptqError as error:
        raise click.UsageError(str(error)) from error
    settings = Settings(prompt_lengths, decode_at, 1, threads, full_name, repeats)
    length = max(SHORTEST_CACHE, *prompt_lengths, *(past + 1 for past in decode_at))
    with tempfile.TemporaryDirectory() as name, listening(0) as progress:
        place = folder or Path(name)
        source = model or synthetic(Path(name), 1, 192, 128)
        files: dict[str, ModelFile] = {}
        checks: dict[str, Check] = {}
        for bits in dict.fromkeys((FLOAT, *wanted.split(","))):
            try:
                made = {bits: compiled(
                    source, place, bits, target=target, recipe=recipe, length=length
                )}
                if bits.startswith("4-16"):
                    made[f"{bits}, fpA_intB"] = with_intb(made[bits])
                checks |= {label: check(file, settings) for label, file in made.items()}
            except FptqError as error:  # the other settings are worth having without this one
                if bits == FLOAT:
                    raise click.ClickException(str(error)) from error
                checks[bits] = Check((f"error: {error}",))
            else:
                files |= made
        sizes = TINY if tiny else Sizes()
        found = measure(files, sizes, rows, settings, device, progress)
    console = Console(markup=False)
    console.print(checks_table(checks))
    console.print(speed_table(found, device))
    if json_path is not None:
        whole = {
            "device": asdict(device), "machine": machine(), "versions": versions(),
            "settings": asdict(settings), "rows": [asdict(row) for row in found],
            "checks": {label: asdict(one) for label, one in checks.items()},
        }
        json_path.write_text(json.dumps(whole, indent=1))
    failed = [label for label, one in checks.items() if not one.good]
    if failed:
        message = f"ran elsewhere, or gave no numbers: {', '.join(failed)}"
        raise click.ClickException(message)


if __name__ == "__main__":
    main()
