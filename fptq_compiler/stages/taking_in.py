"""The first stage: from an export to the record that all others work on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from fptq_compiler.errors import UnsupportedModelError
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.stored import Source, bind_sources, put_away
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.language_model import refuse_fixed_sizes, refuse_inputs, refuse_outputs
from fptq_compiler.passes.drop_inputs import DropInputs
from fptq_compiler.passes.strip_cache import StripCache


def take_in(
    exported: ExportedProgram,
    *,
    cached: bool = False,
    sources: Mapping[str, Source] | None = None,
    folder: Path | None = None,
) -> Program:
    """The record that all stages work on, without the cache that a model was captured with.

    Args:
        exported: as captured.
        cached: whether it gets a cache of ours, which needs token ids as its only input.
        sources: by parameter name where its values lie, if the program holds none.
        folder: where the weights are kept, as far as they have no source, and rewritten ones;
            None is memory.

    Raises:
        UnsupportedModelError: nothing embeds token ids; a captured cache, or input, that cannot
            be taken out; inputs without a plain value, or of one size; a first output that is
            no logits.
        VerificationError: what is left computes something else.
    """
    program = unlift(exported)
    if sources:
        bind_sources(program.module, sources, folder)
    elif folder is not None:
        put_away(program.module, folder)
    vocabulary_of(program)
    refuse_outputs(program)
    run_passes(program, (StripCache(),))
    refuse_inputs(program)
    refuse_fixed_sizes(program)
    if cached:
        run_passes(program, (DropInputs(),))
    return program


def look_into(
    exported: ExportedProgram, *, sources: Mapping[str, Source] | None = None
) -> Program:
    """The record for an inspection, whatever the model takes and gives."""
    program = unlift(exported)
    if sources:
        bind_sources(program.module, sources, None)
    run_passes(program, (StripCache(),))
    return program


def vocabulary_of(program: Program) -> int:
    """Rows of the first embedding table.

    Raises:
        UnsupportedModelError: nothing embeds token ids.
    """
    for node in program.call_nodes(torch.ops.aten.embedding.default):
        table = node.args[0]
        if isinstance(table, torch.fx.Node):
            return int(table.meta["val"].shape[0])
    message = (
        "the graph embeds no token ids, so there is no transformer language model in it; "
        "expected an embedding, attention and linear layers"
    )
    raise UnsupportedModelError(message)
