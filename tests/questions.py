"""A small task in the words of words.py, a model for it, and its scores by a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QUERIES: list[dict[str, Any]] = [
    {"id": 0, "query": "w1 w2 w3", "choices": ["w4 w5", "w6", "w7 w8 w9 w10"], "gold": 1},
    {"id": 1, "query": "w9", "choices": ["w3", "w2 w1"], "gold": 0},
    {"id": 2, "query": "w5 w5 w5 w5 w5 w5", "choices": ["w11 w12", "w13", "w14"], "gold": 2},
    {"id": 3, "query": "w20 w21", "choices": ["w22 w0 w1", "w2 w2"], "gold": 1},
]
SENTENCES: list[dict[str, Any]] = [
    {"id": 0, "sentence": "w1 w2 _ w3 w4", "choices": ["w5", "w6 w7"], "gold": 0},
    {"id": 1, "sentence": "w8 _ w9 w10 w11", "choices": ["w12 w13", "w14"], "gold": 1},
    {"id": 2, "sentence": "_ w1", "choices": ["w2", "w3"], "gold": 1},
]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def running_sum(table: Tensor) -> Callable[[Tensor], Tensor]:
    """A causal model whose logits depend on all tokens so far: table [V, V]."""
    return lambda ids: table[ids].cumsum(dim=1)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def pairs_of(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids of context and continuation of each choice, by hand."""
    if "query" in row:
        return [(ids_of(row["query"]), ids_of(choice)) for choice in row["choices"]]
    before, after = row["sentence"].split("_")
    return [(ids_of(before + choice), ids_of(after)) for choice in row["choices"]]


def plain_score(
    logits: Callable[[Tensor], Tensor], context: list[int], continuation: list[int]
) -> float:
    """Each token by itself after all that stands before it, in float64."""
    total = 0.0
    for n, token in enumerate(continuation):
        before = torch.tensor([context + continuation[:n]])
        total += float(logits(before)[0, -1].double().log_softmax(-1)[token])
    return total
