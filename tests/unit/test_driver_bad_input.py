"""Models and calibration data that cannot be compiled: the message and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.compiling import SMALL
from tests.shop import FREE, Shop, archive, save_export
from tests.toys import ToyConfig, make_tokens, make_toy

# --- the model ---------------------------------------------------------------------------------


def test_not_an_archive(shop: Shop) -> None:
    path = shop.folder / "notes.pt"
    path.write_text("dear diary", encoding="utf-8")
    shop.fails(3, "notes.pt: expected a torch.export archive", path)


def test_an_empty_file(shop: Shop) -> None:
    path = shop.folder / "nothing.pt"
    path.touch()
    shop.fails(3, "found an empty file", path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_truncated_archive(shop: Shop, toy: Path, part: float) -> None:
    path = shop.folder / "half.pt2"
    content = toy.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    shop.fails(3, "half.pt2: the archive is truncated or damaged", path)


def test_another_pickle(shop: Shop) -> None:
    path = shop.folder / "state.pt"
    torch.save(make_toy(SMALL).state_dict(), path)
    shop.fails(3, "--trust-pickle", path)
    shop.fails(3, "expected a pickled torch.nn.Module, found OrderedDict", path, "--trust-pickle")


def test_a_pickled_module_needs_example_inputs(shop: Shop) -> None:
    path = shop.folder / "toy.pt"
    torch.save(make_toy(SMALL), path)
    shop.fails(3, "--trust-pickle", path)
    shop.fails(3, "can only be exported with example inputs", path, "--trust-pickle")
    words = np.zeros((2, 7), dtype=np.float32)
    examples = shop.folder / "examples.npy"
    np.save(examples, words)
    shop.fails(
        3, "expected integer token ids", path, "--trust-pickle", "--example-inputs", examples
    )
    np.save(examples, np.zeros((2, 3, 4), dtype=np.int64))
    shop.fails(
        3, "found int64 [2, 3, 4]", path, "--trust-pickle", "--example-inputs", examples
    )


class Stack(nn.Module):
    """An embedding and linear layers: no attention, no MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.first(self.embed(ids)))


class Convolution(nn.Module):
    """A picture in, numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, picture: Tensor) -> Tensor:
        return self.layer(picture).relu().mean((2, 3))


def test_a_graph_with_no_transformer_in_it(shop: Shop) -> None:
    ids = torch.zeros(2, 7, dtype=torch.int64)
    linears = save_export(Stack(), ids, shop.folder / "stack.pt2")
    shop.fails(3, "no attention and no MLP was found in the graph", linears)
    assert "fptq-inspect" in shop.said
    pictures = save_export(Convolution(), torch.zeros(2, 3, 8, 8), shop.folder / "conv.pt2")
    shop.fails(3, "the graph embeds no token ids", pictures)


@pytest.mark.parametrize(
    ("sizes", "fixed"),
    [
        ({0: FREE[0]}, "the sequence to 7"),
        ({1: FREE[1]}, "the batch to 2"),
        ({}, "the batch to 2 and the sequence to 7"),
    ],
)
def test_an_export_of_one_size(shop: Shop, sizes: dict[int, Any], fixed: str) -> None:
    path = shop.folder / "fixed.pt2"
    exported = torch.export.export(
        make_toy(SMALL), (make_tokens(SMALL, 2, 7),), dynamic_shapes=(sizes,), strict=False
    )
    torch.export.save(exported, path)
    shop.fails(3, f"the export fixes {fixed} in input_ids, expected both free", path)


def test_weights_that_are_not_numbers(shop: Shop) -> None:
    broken = make_toy(SMALL)
    broken.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    path = save_export(broken, make_tokens(SMALL, 2, 7), shop.folder / "nan.pt2")
    shop.fails(3, "model.layers.0.mlp.up_proj.weight has 1 values that are NaN", path)


# --- sites -------------------------------------------------------------------------------------


def test_a_demanded_transform_without_a_site(shop: Shop) -> None:
    path = archive(ToyConfig(layers=1, qk_norm=True), shop.folder)
    shop.fails(3, "the recipe demands prerope", path, "--transforms", "prerope,value")
    assert "near miss: prerope at rms_norm" in shop.said
    assert "a norm stands between the projection and attention" in shop.said
    assert "toys.py" in shop.said


def test_a_demanded_value_transform_where_v_has_two_readers(shop: Shop) -> None:
    path = archive(ToyConfig(layers=1, value_readers=2), shop.folder)
    shop.fails(3, "the recipe demands value", path, "--transforms", "value")
    assert "v has a second reader, mean" in shop.said


# --- calibration -------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary(shop: Shop, toy: Path) -> None:
    ids = shop.folder / "ids.npy"
    np.save(ids, np.full((4, 24), 61))
    shop.fails(3, "61", toy, "--calibration", ids)
    assert "ids.npy" in shop.said
    np.save(ids, np.full((4, 24), -1))
    shop.fails(3, "-1", toy, "--calibration", ids)


def test_an_empty_calibration_file(shop: Shop, toy: Path) -> None:
    path = shop.folder / "empty.npy"
    path.touch()
    shop.fails(3, "empty.npy: the file is empty", toy, "--calibration", path)
    np.save(path, np.zeros((0, 24), dtype=np.int64))
    shop.fails(3, "empty.npy", toy, "--calibration", path)


def test_an_object_array_is_not_unpickled(shop: Shop, toy: Path) -> None:
    path = shop.folder / "objects.npy"
    marker = shop.folder / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    shop.fails(3, "objects.npy", toy, "--calibration", path)
    assert not marker.exists()


def test_text_without_a_tokenizer(shop: Shop, toy: Path) -> None:
    path = shop.folder / "text.txt"
    path.write_text("once upon a time", encoding="utf-8")
    shop.fails(3, "tokenizer", toy, "--calibration", path)
