"""What torch gets to read of an archive: no example inputs, and no containers but plain ones.

The compiler needs neither the example inputs, which are a pickle, nor the containers in which a
program once took and gave its tensors. Where a container is a transformers cache, the program
takes its tensors one by one instead, so that no class has to be known or registered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.export.pt2_archive import _package

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/"
CACHES = frozenset(
    {"transformers.cache_utils.DynamicCache", "transformers.cache_utils:DynamicCache"}
)
_LEAF: Mapping[str, Any] = {"type": None, "context": None, "children_spec": []}


class PlainReader(_package.PT2ArchiveReader):
    """A reader for which example inputs are empty and caches are flat tuples."""

    def read_bytes(self, file_name: str) -> bytes:
        """The bytes of a part."""
        if file_name.startswith(SAMPLES):
            return b""
        data: bytes = super().read_bytes(file_name)
        return flatten_caches(data) if file_name == MODEL else data


@contextmanager
def plain_reader() -> Iterator[None]:
    """Make `torch.export.load` read archives through `PlainReader`."""
    before = _package.PT2ArchiveReader
    _package.PT2ArchiveReader = PlainReader  # type: ignore[misc]  # the class, not an instance
    try:
        yield
    finally:
        _package.PT2ArchiveReader = before  # type: ignore[misc]


def flatten_caches(data: bytes) -> bytes:
    """The JSON of a program, where no tree specification names a cache any more."""
    document = json.loads(data)
    changed = False
    for entry in document["graph_module"]["module_call_graph"]:
        signature = entry.get("signature")
        if signature is None:
            continue
        inputs, outputs = (json.loads(signature[k])[1] for k in ("in_spec", "out_spec"))
        if not _has_cache(inputs) and not _has_cache(outputs):
            continue
        positional = _node("builtins.tuple", None, [_LEAF] * _leaves(inputs))
        named = _node("builtins.dict", [], [])
        signature["in_spec"] = _dumps(_node("builtins.tuple", None, [positional, named]))
        signature["out_spec"] = _dumps(
            _node("builtins.tuple", None, [_LEAF] * _leaves(outputs))
        )
        signature["forward_arg_names"] = None
        changed = True
    return json.dumps(document).encode() if changed else data


def _has_cache(tree: Mapping[str, Any]) -> bool:
    return tree["type"] in CACHES or any(_has_cache(x) for x in tree["children_spec"])


def _leaves(tree: Mapping[str, Any]) -> int:
    if tree["type"] is None:
        return 1
    return sum(_leaves(x) for x in tree["children_spec"])


def _node(kind: str, context: object, children: list[Any]) -> dict[str, Any]:
    return {"type": kind, "context": json.dumps(context), "children_spec": children}


def _dumps(tree: Mapping[str, Any]) -> str:
    return json.dumps([1, tree])  # 1: the protocol of torch's tree specifications
