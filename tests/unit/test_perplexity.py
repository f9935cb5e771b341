from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fptq_compiler.closeness import Comparison
from fptq_compiler.errors import (
    CaptureError,
    RecipeError,
    RuntimeInputError,
    RuntimeLoadError,
    VerificationError,
)
from fptq_compiler.perplexity import ort_logits, perplexity


def bigram(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda ids: table[ids]


def random_table(generator: torch.Generator) -> Tensor:
    return torch.randn(11, 11, generator=generator)


def write_bigram(
    path: Path, table: Tensor, inputs: tuple[str, ...] = ("tokens",), batch: int | str = "B"
) -> Path:
    nodes = [helper.make_node("Gather", ["table", inputs[0]], ["logits"], axis=0)]
    graph = helper.make_graph(
        nodes,
        "bigram",
        [helper.make_tensor_value_info(name, TensorProto.INT64, [batch, "T"]) for name in inputs],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, "T", "V"])],
        [numpy_helper.from_array(table.numpy(), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    stream = torch.arange(40) % 11
    result = perplexity(bigram(torch.zeros(11, 11)), stream, window=8)
    assert result.perplexity == pytest.approx(11.0, rel=1e-6)  # log_softmax is in float32
    assert (result.tokens, result.windows) == (40, 5)


def test_mean_is_over_all_but_the_first_position_of_each_window(
    generator: torch.Generator,
) -> None:
    table = random_table(generator)
    stream = torch.randint(11, (27,), generator=generator)
    log_p = torch.log_softmax(table.double(), dim=-1)
    pairs = [(at, at + 1) for first in (0, 8, 16) for at in range(first, first + 7)]
    expected = -sum(float(log_p[stream[a], stream[b]]) for a, b in pairs) / len(pairs)
    result = perplexity(bigram(table), stream, window=8)
    assert result.nll == pytest.approx(expected, rel=1e-6)  # float32 against float64
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_long_windows_are_summed_in_parts(generator: torch.Generator) -> None:
    table = random_table(generator)
    stream = torch.randint(11, (600,), generator=generator)
    log_p = torch.log_softmax(table.double(), dim=-1)
    expected = -float(log_p[stream[:-1], stream[1:]].mean())
    result = perplexity(bigram(table), stream, window=600)
    assert result.nll == pytest.approx(expected, rel=1e-6)


def test_tokens_takes_the_first_ones(generator: torch.Generator) -> None:
    stream = torch.arange(40) % 11
    result = perplexity(bigram(random_table(generator)), stream, window=8, tokens=20)
    assert (result.tokens, result.windows) == (16, 2)
    assert result.to_dict()["windows"] == 2


def test_a_hopeless_model_is_infinite_not_an_error() -> None:
    table = torch.zeros(11, 11)
    table[:, 0] = 1e6
    result = perplexity(bigram(table), torch.ones(8, dtype=torch.int64), window=8)
    assert result.perplexity == math.inf


def test_too_little_text_is_refused(generator: torch.Generator) -> None:
    model = bigram(random_table(generator))
    stream = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(RecipeError, match="7 tokens do not fill one window of 8"):
        perplexity(model, stream, window=8)
    with pytest.raises(RecipeError, match="expected at least 2"):
        perplexity(model, stream, window=1)


def test_what_is_no_logit_is_refused() -> None:
    stream = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(VerificationError, match="not numbers"):
        perplexity(bigram(torch.full((11, 11), math.nan)), stream, window=8)
    with pytest.raises(VerificationError, match=r"shape \(1, 8\), expected \(1, 8, vocabulary\)"):
        perplexity(lambda ids: ids.float(), stream, window=8)


def test_tokens_outside_the_vocabulary_ask_for_the_right_tokenizer(
    tmp_path: Path, generator: torch.Generator
) -> None:
    stream = torch.full((8,), 11)
    with pytest.raises(CaptureError, match="own tokenizer"):
        perplexity(bigram(random_table(generator)), stream, window=8)
    with pytest.raises(CaptureError, match="id 11 is outside the model's vocabulary of 11"):
        perplexity(lambda ids: torch.zeros(1, 8, 11), stream, window=8)
    file = write_bigram(tmp_path / "m.onnx", random_table(generator))
    with pytest.raises(RuntimeInputError, match=r"ONNX Runtime failed|from 11 to 11"):
        perplexity(ort_logits(file), stream, window=8)


def test_an_onnx_file_gives_the_same_logits(tmp_path: Path, generator: torch.Generator) -> None:
    table = random_table(generator)
    logits = ort_logits(write_bigram(tmp_path / "m.onnx", table), threads=1)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(logits(ids), table[ids])  # Gather copies


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_file_of_a_fixed_batch_runs_that_many_at_once(
    tmp_path: Path, generator: torch.Generator, rows: int
) -> None:
    table = random_table(generator)
    logits = ort_logits(write_bigram(tmp_path / "m.onnx", table, batch=2), threads=1)
    ids = torch.randint(11, (rows, 4), generator=generator)
    assert torch.equal(logits(ids), table[ids])


def test_a_comparison_reads_the_same_predictions(generator: torch.Generator) -> None:
    table, original = random_table(generator), random_table(generator)
    stream = torch.randint(11, (27,), generator=generator)
    comparison = Comparison(bigram(original))
    plain = perplexity(bigram(table), stream, window=8)
    compared = perplexity(bigram(table), stream, window=8, compare=comparison)
    assert compared.nll == plain.nll
    read = torch.cat([stream[first : first + 7] for first in (0, 8, 16)])
    q, p = (t[read].double().log_softmax(-1) for t in (table, original))
    middle = ((p.exp() + q.exp()) / 2).log()
    kl = (p.exp() * (p - q)).sum(-1)
    js = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    found = comparison.result()
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)  # float32 against float64
    assert found.jensen_shannon == pytest.approx(float(js.mean()), rel=1e-5)
    agreeing = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(agreeing))


def test_an_original_with_another_vocabulary_is_refused(generator: torch.Generator) -> None:
    comparison = Comparison(lambda ids: torch.zeros(*ids.shape, 12))
    stream = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(VerificationError, match="vocabulary of 12, the model one of 11"):
        perplexity(bigram(random_table(generator)), stream, window=8, compare=comparison)


def test_what_is_no_onnx_model_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    with pytest.raises(RuntimeLoadError, match="no such file"):
        ort_logits(tmp_path / "none.onnx")
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no model at all" * 4)
    with pytest.raises(RuntimeLoadError, match="not an ONNX file"):
        ort_logits(garbage)
    two = write_bigram(tmp_path / "two.onnx", random_table(generator), ("tokens", "mask"))
    with pytest.raises(RuntimeLoadError, match="tokens"):
        ort_logits(two)
