"""Token ids from files, and text that a model writes itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fptq_compiler.errors import CaptureError
from fptq_compiler.text import (
    load_calibration,
    load_tokenizer,
    self_generated,
    token_stream,
    windows,
)

WORDS = ["the", "cat", "sat", "on", "mat"]


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    vocabulary = {word: index for index, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tokenizer_file)


def write_text(tmp_path: Path, text: str, name: str = "words.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_becomes_windows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_text(tmp_path, "the cat sat on the mat\n" * 3)
    found = load_calibration(path, tokenizer=tokenizer, samples=9, length=5, vocabulary=6)
    assert found.origin == "words.txt"
    expected = [[1, 2, 3, 4, 1], [5, 1, 2, 3, 4], [1, 5, 1, 2, 3]]
    assert found.ids.tolist() == expected
    assert found.ids.dtype == torch.int64


def test_a_limit_does_not_change_the_stream(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_text(tmp_path, "the cat sat on the mat\n" * 3000)
    whole = token_stream(path, tokenizer)
    assert whole.numel() == 18000
    for limit in (1, 100, 17999, 20000):
        assert torch.equal(token_stream(path, tokenizer, limit), whole[:limit])


def test_a_folder_is_a_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "folder")
    again = load_tokenizer(tmp_path / "folder")
    assert again("cat mat", add_special_tokens=False)["input_ids"] == [2, 5]


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path, "{", "tokenizer.json")
    with pytest.raises(CaptureError, match=r"tokenizer\.json: the tokenizer cannot be loaded"):
        load_tokenizer(path)
    with pytest.raises(CaptureError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_text(tmp_path, "the cat")
    with pytest.raises(CaptureError, match=r"words\.txt: text needs a tokenizer"):
        load_calibration(path, tokenizer=None, samples=1, length=2, vocabulary=6)
    path = write_text(tmp_path, json.dumps({"text": "the cat"}), "rows.jsonl")
    with pytest.raises(CaptureError, match=r"rows\.jsonl, row 1: text needs a tokenizer"):
        load_calibration(path, tokenizer=None, samples=1, length=2, vocabulary=6)


@pytest.mark.parametrize("name", ["empty.txt", "empty.npy", "empty.jsonl"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CaptureError, match=f"{name}: the file is empty"):
        load_calibration(tmp_path / name, tokenizer=None, samples=1, length=2, vocabulary=6)


def test_text_that_is_not_utf8_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    with pytest.raises(CaptureError, match=r"latin\.txt: expected UTF-8"):
        token_stream(tmp_path / "latin.txt", tokenizer)


def test_too_few_tokens_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_text(tmp_path, "the cat sat")
    with pytest.raises(CaptureError, match=r"words\.txt: found 3 tokens, expected at least 4"):
        load_calibration(path, tokenizer=tokenizer, samples=1, length=4, vocabulary=6)


def test_arrays_of_ids_are_read(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(12, dtype=np.uint16))
    found = load_calibration(path, tokenizer=None, samples=2, length=5, vocabulary=12)
    assert found.ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    np.save(path, np.arange(12).reshape(3, 4))
    found = load_calibration(path, tokenizer=None, samples=2, length=3, vocabulary=12)
    assert found.ids.tolist() == [[0, 1, 2], [4, 5, 6]]
    with pytest.raises(CaptureError, match=r"ids\.npy: rows have 4 tokens, expected at least 5"):
        load_calibration(path, tokenizer=None, samples=2, length=5, vocabulary=12)


def test_ids_outside_the_vocabulary_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([1, 2, 9, 9]))
    with pytest.raises(CaptureError, match=r"token id 9 at position 2 is outside \[0, 9\)"):
        load_calibration(path, tokenizer=None, samples=1, length=2, vocabulary=9)
    np.save(path, np.array([[1, 2], [3, -1]]))
    with pytest.raises(CaptureError, match=r"token id -1 at row 1, 1 is outside"):
        load_calibration(path, tokenizer=None, samples=1, length=2, vocabulary=9)


def test_arrays_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"

    def load() -> None:
        load_calibration(path, tokenizer=None, samples=1, length=2, vocabulary=9)

    np.save(path, np.ones(4))
    with pytest.raises(CaptureError, match="expected integer token ids, found float64"):
        load()
    np.save(path, np.array([1, {}], dtype=object), allow_pickle=True)
    with pytest.raises(CaptureError, match="cannot be read as plain numbers"):
        load()
    np.save(path, np.ones((1, 2, 3), dtype=np.int64))
    with pytest.raises(CaptureError, match=r"found \[1, 2, 3\]"):
        load()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CaptureError, match="cannot be read as plain numbers"):
        load()


def test_rows_of_json_are_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"text": "the cat"}, {"input_ids": [5, 4, 3]}]
    path = write_text(tmp_path, "\n".join(map(json.dumps, rows)), "rows.jsonl")
    found = load_calibration(path, tokenizer=tokenizer, samples=5, length=2, vocabulary=6)
    assert found.ids.tolist() == [[1, 2], [5, 4]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ('{"body": "x"}', r"found \['body'\]"),
        ('{"input_ids": [1, "x"]}', r"found \['input_ids'\]"),
        ("[1, 2]", "found list"),
        ('{"input_ids": [99999999999999999999]}', "no token id"),
    ],
)
def test_a_bad_row_is_numbered(row: str, reason: str, tmp_path: Path) -> None:
    path = write_text(tmp_path, '{"input_ids": [1]}\n' + row + "\n", "rows.jsonl")
    with pytest.raises(CaptureError, match=rf"rows\.jsonl, row 2: .*{reason}"):
        load_calibration(path, tokenizer=None, samples=5, length=2, vocabulary=6)


def test_windows_do_not_overlap() -> None:
    assert windows(torch.arange(7), 3, 5).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(CaptureError, match="found 2 tokens, expected at least 3"):
        windows(torch.arange(2), 3, 5)


def counting(vocabulary: int, calls: list[tuple[int, ...]]):
    """A model that is sure that the next id is the last one plus one."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(ids.shape))
        following = (ids + 1) % vocabulary
        return 100.0 * torch.nn.functional.one_hot(following, vocabulary).float()

    return logits


def test_a_model_writes_its_own_text() -> None:
    calls: list[tuple[int, ...]] = []
    steps: list[tuple[int, int]] = []
    found = self_generated(
        counting(10, calls),
        vocabulary=10,
        samples=4,
        length=12,
        seed=1,
        start=7,
        progress=lambda done, total: steps.append((done, total)),
        context=6,
    )
    assert found.origin == "self-generated"
    assert found.ids.shape == (4, 12)
    assert found.ids[0].tolist() == [(7 + step) % 10 for step in range(12)]
    assert found.ids[1].tolist() == [(8 + step) % 10 for step in range(12)]
    assert max(shape[1] for shape in calls) < 6 + 1
    assert steps[-1] == (12, 12)


def test_without_a_start_the_first_tokens_differ() -> None:
    calls: list[tuple[int, ...]] = []
    found = self_generated(counting(50, calls), vocabulary=50, samples=8, length=3, seed=1)
    assert len(set(found.ids[:, 0].tolist())) > 3
    assert torch.equal(found.ids[:, 1], (found.ids[:, 0] + 1) % 50)
    assert min(min(shape) for shape in calls) >= 2  # exported programs assume two


def test_one_sample_is_possible_and_seeds_decide() -> None:
    def uniform(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 40)

    def write(seed: int) -> list[list[int]]:
        return self_generated(
            uniform, vocabulary=32, samples=1, length=20, seed=seed
        ).ids.tolist()

    assert write(3) == write(3)
    assert write(3) != write(4)
    assert max(write(3)[0]) < 32  # the rows beyond the vocabulary are padding


def test_logits_that_are_not_finite_are_refused() -> None:
    def broken(ids: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, 5), float("nan"))

    with pytest.raises(CaptureError, match="logits for token 1 are not finite"):
        self_generated(broken, vocabulary=5, samples=2, length=4, seed=0)


def test_a_long_text_is_tokenised_without_a_warning(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    path = shared_data / "text" / "wikitext-2-raw" / "wiki.test.raw"
    whole = token_stream(path, tokenizer)
    assert whole.numel() > 500_000
    assert torch.equal(token_stream(path, tokenizer, 3000), whole[:3000])
