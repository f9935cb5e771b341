"""What `fptq-inspect` says of a model: records of names and numbers, and their JSON.

The JSON is for tools: `schema` names it and `version` counts what changes in it. Fields may be
added in a version; none is renamed, removed or given another meaning.

    schema, version     "fptq-inspect", 1
    model               base name of the file or folder
    export              seconds, nodes, parameters, bytes: what capturing cost and gave
    sites               name, kind, node, source, shape, words, transforms, quantizers
    near_misses         what, node, reason, source: what was almost recognised
    unrecognised        kind, place, node, reason, source, meaning: what no pass understood
    quantizers          kind, name, role, bits, readers, of the default recipe
    versions            of the packages

`source` is null or file, line and function of the model's code. `shape` holds numbers, words and
lists by the kind of the site. `transforms` has for each name applies, reason, node and source;
the last three say why not. `quantizers` of a site are those whose `name` stands in the list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fptq_compiler.source_line import SourceLine

SCHEMA: Final = "fptq-inspect"
VERSION: Final = 1


@dataclass(frozen=True)
class Verdict:
    """Whether a transform applies at a site; else why not, and the node and line that show it."""

    applies: bool
    reason: str = ""
    node: str = ""
    source: SourceLine | None = None


@dataclass(frozen=True)
class InspectedSite:
    """One site.

    Attributes:
        name: path of its module where there is one.
        kind: residual, attention or mlp.
        node: the node that it was found at.
        source: where that node is written.
        shape: heads, widths and the like, as data.
        words: the same for a reader.
        transforms: a verdict for each transform that acts on such a site.
        quantizers: names of those at its linears, keys and values.
    """

    name: str
    kind: str
    node: str
    source: SourceLine | None
    shape: Mapping[str, Any]
    words: str
    transforms: Mapping[str, Verdict]
    quantizers: tuple[str, ...] = ()


@dataclass(frozen=True)
class InspectedMiss:
    """Something that was almost recognised: what, where and why not."""

    what: str
    node: str
    reason: str
    source: SourceLine | None


@dataclass(frozen=True)
class Unrecognised:
    """A part of the model that no pass understood, and what that means for the file.

    Attributes:
        kind: attention, linear layers, block, weight or operator.
        place: path of the module where there is one, else the node.
        node: the first node of it.
        reason: what was expected and found.
        source: where it is written.
        meaning: what is still quantised there and what stays float.
    """

    kind: str
    place: str
    node: str
    reason: str
    source: SourceLine | None
    meaning: str


@dataclass(frozen=True)
class InspectedQuantizer:
    """A quantiser that the default recipe places: on a weight, or on an activation's readers."""

    kind: str
    name: str
    role: str
    bits: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class ExportCost:
    """What capturing the model cost, in seconds, and the size of what it gave."""

    seconds: float
    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """Everything that `fptq-inspect` knows of one model."""

    model: str
    export: ExportCost
    sites: tuple[InspectedSite, ...]
    near_misses: tuple[InspectedMiss, ...] = ()
    unrecognised: tuple[Unrecognised, ...] = ()
    quantizers: tuple[InspectedQuantizer, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Writes the JSON that the module's text describes."""
        content = {"schema": SCHEMA, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
