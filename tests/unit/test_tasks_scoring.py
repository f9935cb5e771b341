from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fptq_compiler.errors import CaptureError, RuntimeInputError, VerificationError
from fptq_compiler.perplexity import ort_logits
from fptq_compiler.progress import SilentProgress
from fptq_compiler.recipe import CacheRecipe
from fptq_compiler.runtime.session_file import SessionFile, write_session_file
from fptq_compiler.tasks import scoring
from fptq_compiler.tasks.accuracy import likeliest, share
from fptq_compiler.tasks.evaluate import TaskResult, evaluate_task
from fptq_compiler.tasks.rows import read_task
from fptq_compiler.tasks.scoring import TokenPair, encode_pair, score
from tests.cached_model import CACHE_TYPES, VOCABULARY, write_cached_model
from tests.compiling import CACHE_LENGTH, SMALL, compile_toy, quick
from tests.questions import (
    QUERIES,
    SENTENCES,
    pairs_of,
    plain_score,
    running_sum,
    write_rows,
)
from tests.words import word_tokenizer

FLOAT32 = 1e-5
"""Log-softmax in float32 against float64, some tokens of some nats each."""


def letters() -> Any:
    """Single letters and spaces, and the tokens "ab" and " c"."""
    vocabulary = {token: n for n, token in enumerate(["a", "b", "c", " ", "ab", " c"])}
    model = models.BPE(vocabulary, [("a", "b"), (" ", "c")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def random_pairs(generator: torch.Generator, count: int, vocabulary: int) -> list[TokenPair]:
    def ids() -> Tensor:
        length = int(torch.randint(1, 9, (), generator=generator))
        return torch.randint(vocabulary, (length,), generator=generator)

    return [TokenPair(f"line {n}", ids(), ids()) for n in range(count)]


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("ba", " c", [1, 0], [5]),
        ("ba ", "c", [1, 0], [5]),  # the space belongs to the token behind it
        ("ba  ", "c", [1, 0], [3, 5]),
        ("ca", "bc", [2, 0], [2]),  # "cab" is c, ab: only what comes after as many is scored
    ],
)
def test_the_boundary_between_context_and_continuation(
    context: str, continuation: str, before: list[int], after: list[int]
) -> None:
    pair = encode_pair(context, continuation, letters(), "line 1")
    assert (pair.context.tolist(), pair.continuation.tolist()) == (before, after)
    assert pair.inputs.tolist() == (before + after)[:-1]


def test_a_continuation_without_tokens_of_its_own_is_refused() -> None:
    with pytest.raises(CaptureError, match="line 7: the continuation has no tokens"):
        encode_pair("a", "b", letters(), "line 7")
    with pytest.raises(CaptureError, match="line 7: the context has no tokens"):
        encode_pair(" ", "b", letters(), "line 7")


def test_scores_are_those_of_a_loop_over_single_tokens(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 20)
    model = running_sum(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
    pairs = random_pairs(generator, 30, VOCABULARY)
    sizes = []

    def watched(ids: Tensor) -> Tensor:
        sizes.append(ids.numel())
        return model(ids)

    found = score(watched, pairs, SilentProgress(), "toy")
    expected = [
        plain_score(model, pair.context.tolist(), pair.continuation.tolist()) for pair in pairs
    ]
    assert found == pytest.approx(expected, rel=FLOAT32)
    assert max(sizes) <= 20
    assert len(sizes) < len(pairs)


def test_a_sequence_longer_than_a_batch_runs_alone(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 3)
    model = running_sum(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
    pair = TokenPair("line 1", torch.arange(5), torch.arange(4))
    (found,) = score(model, [pair], SilentProgress(), "toy")
    assert found == pytest.approx(plain_score(model, [*range(5)], [*range(4)]), rel=FLOAT32)


@pytest.mark.parametrize("cache", [None, *CACHE_TYPES])
def test_padding_and_the_batch_change_nothing_in_a_file(
    tmp_path: Path, generator: torch.Generator, cache: str | None
) -> None:
    """With an attention mask and an empty cache, where the file has them."""
    logits = ort_logits(write_cached_model(tmp_path / "m.onnx", cache), threads=1)
    pairs = random_pairs(generator, 12, VOCABULARY)
    together = score(logits, pairs, SilentProgress(), "toy")
    alone = [score(logits, [pair], SilentProgress(), "toy")[0] for pair in pairs]
    assert together == pytest.approx(alone, rel=FLOAT32)
    longest = max(pairs, key=lambda pair: pair.inputs.numel())
    ids = longest.context.tolist(), longest.continuation.tolist()
    assert score(logits, [longest], SilentProgress(), "toy") == pytest.approx(
        [plain_score(logits, *ids)], rel=FLOAT32
    )


def test_padding_and_the_batch_change_nothing_in_a_compiled_file(
    tmp_path: Path, generator: torch.Generator
) -> None:
    """4-bit weights, 8-bit activations and cache, against the program it was made from."""
    recipe = quick("4-8-8", cache=CacheRecipe(enabled=True, max_length=CACHE_LENGTH))
    compiled = compile_toy(SMALL, recipe, tmp_path / "toy.onnx")
    pairs = random_pairs(generator, 12, SMALL.vocabulary)
    logits = ort_logits(compiled.path, threads=1)
    together = score(logits, pairs, SilentProgress(), "toy")
    alone = [score(logits, [pair], SilentProgress(), "toy")[0] for pair in pairs]
    assert together == pytest.approx(alone, rel=FLOAT32)
    in_torch = score(compiled.program.run, pairs, SilentProgress(), "toy")
    assert together == pytest.approx(in_torch, rel=FLOAT32)


def test_what_a_model_refuses_is_said_with_the_row(
    tmp_path: Path, generator: torch.Generator
) -> None:
    path = write_cached_model(tmp_path / "m.onnx", "int8")
    write_session_file(path, SessionFile(context_length=6))
    short = TokenPair("line 1", torch.tensor([1]), torch.tensor([2]))
    long = TokenPair("line 2", torch.arange(4), torch.arange(4))
    with pytest.raises(RuntimeInputError, match=r"line 2: .* more than the model's context of 6"):
        score(ort_logits(path), [short, long], SilentProgress(), "toy")
    nan = running_sum(torch.full((VOCABULARY, VOCABULARY), math.nan))
    with pytest.raises(VerificationError, match=r"line 1: .* not numbers \(NaN\)"):
        score(nan, [short], SilentProgress(), "toy")
    small = running_sum(torch.zeros(VOCABULARY, 2))
    with pytest.raises(CaptureError, match="line 1: token id 2 is outside"):
        score(small, [short], SilentProgress(), "toy")


def expected_result(model: Any, rows: list[dict[str, Any]]) -> tuple[list[bool], list[bool]]:
    """Whether each row is right by the sums, and by the sums over characters."""
    acc, acc_norm = [], []
    for row in rows:
        sums = [plain_score(model, *pair) for pair in pairs_of(row)]
        by_length = [s / len(choice) for s, choice in zip(sums, row["choices"], strict=True)]
        acc.append(sums.index(max(sums)) == row["gold"])
        acc_norm.append(by_length.index(max(by_length)) == row["gold"])
    return acc, acc_norm


def result_of(tmp_path: Path, name: str, file: str, rows: Any, model: Any) -> TaskResult:
    write_rows(tmp_path / file, rows)
    return evaluate_task(model, word_tokenizer(), read_task(name, tmp_path), SilentProgress())


def test_a_task_with_queries(tmp_path: Path) -> None:
    """The table is one where acc and acc_norm differ."""
    generator = torch.Generator().manual_seed(1)
    model = running_sum(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
    acc, acc_norm = expected_result(model, QUERIES)
    assert acc != acc_norm
    found = result_of(tmp_path, "piqa", "piqa_valid.jsonl", QUERIES, model)
    p, q = sum(acc) / 4, sum(acc_norm) / 4
    assert (found.task, found.rows, found.acc, found.acc_norm) == ("piqa", 4, p, q)
    assert found.acc_stderr == pytest.approx(math.sqrt(p * (1 - p) / 3))
    assert found.acc_norm_stderr == pytest.approx(math.sqrt(q * (1 - q) / 3))
    pairs = [pair for row in QUERIES for pair in pairs_of(row)]
    assert found.tokens == sum(len(before) + len(after) - 1 for before, after in pairs)


def test_a_task_with_sentences_has_no_acc_norm(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = running_sum(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
    acc, _ = expected_result(model, SENTENCES)
    found = result_of(tmp_path, "winogrande", "winogrande_dev.jsonl", SENTENCES, model)
    assert (found.rows, found.acc) == (3, sum(acc) / 3)
    assert (found.acc_norm, found.acc_norm_stderr) == (None, None)


def test_a_single_row_has_no_standard_error() -> None:
    assert share([True]) == (1.0, None)
    assert share([True, False]) == (0.5, 0.5)
    assert share([False, False, False]) == (0.0, 0.0)


def test_of_equal_scores_the_first_is_taken() -> None:
    assert likeliest([-2.0, -1.0, -1.0]) == 1
