"""What the user named is told by its content; modules and pickles."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_compiler.capture import capture, load_example_inputs, refuse_non_finite
from fptq_compiler.errors import CaptureError


class Plain(torch.nn.Module):
    """ids [B, S], optional weights per position [B, S] → [B, S, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 3)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        values = self.embedding(ids)
        return values if scale is None else values * scale[..., None]


class Fixed(Plain):
    """Reads the second column count as a number."""

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(ids) + torch.ones(5)[:, None]


class Branching(Plain):
    """Branches on a value."""

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(ids) if ids.sum() > 3 else super().forward(ids) * 2


EXAMPLE = (torch.zeros(2, 5, dtype=torch.int64),)


def test_a_module_keeps_both_sizes_free() -> None:
    module = Plain().train()
    captured = capture(module, example_inputs=EXAMPLE)
    assert (captured.kind, captured.origin) == ("module", "Plain")
    assert module.training
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(captured.program.module(check_guards=False)(ids), module(ids))


def test_an_example_of_one_row_does_not_fix_the_batch() -> None:
    captured = capture(Plain(), example_inputs=(torch.zeros(1, 1, dtype=torch.int64),))
    ids = torch.zeros(4, 9, dtype=torch.int64)
    assert captured.program.module(check_guards=False)(ids).shape == (4, 9, 3)


def test_a_second_integer_input_is_free_too() -> None:
    module = Plain()
    captured = capture(module, example_inputs=(EXAMPLE[0], EXAMPLE[0].int()))
    ids, scale = torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int32)
    assert captured.program.module(check_guards=False)(ids, scale).shape == (3, 4, 3)


def test_a_fixed_size_is_named() -> None:
    with pytest.raises(CaptureError, match="Fixed: the sequence dimension of 'ids' became 5"):
        capture(Fixed(), example_inputs=EXAMPLE)


def test_a_branch_on_values_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Branching: torch\.export cannot trace the model"):
        capture(Branching(), example_inputs=EXAMPLE)


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(CaptureError, match="Plain: a module can only be exported with example"):
        capture(Plain())
    with pytest.raises(CaptureError, match=r"no input is an integer tensor.*float32 \[2, 2\]"):
        capture(Plain(), example_inputs=(torch.zeros(2, 2),))


def test_a_pickled_module_needs_trust_and_examples(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.save(Plain(), path)
    with pytest.raises(CaptureError, match=r"model\.pt2: this is a pickled Python object"):
        capture(path, example_inputs=EXAMPLE)
    with pytest.raises(CaptureError, match="example inputs, found none"):
        capture(path, trust_pickle=True)
    assert capture(path, trust_pickle=True, example_inputs=EXAMPLE).kind == "pickle"


def test_a_state_dict_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(Plain().state_dict(), path)
    with pytest.raises(CaptureError, match=r"found OrderedDict\. It looks like a state dict"):
        capture(path, trust_pickle=True, example_inputs=EXAMPLE)


def test_an_old_pickle_is_recognised_and_not_run(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "model.bin"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(CaptureError, match="loading it runs code"):
        capture(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"model\.pt2: .*(expected|truncated)"):
        capture(path)


def test_another_zip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("notes.txt", "hello")
    with pytest.raises(CaptureError, match=r"neither a torch\.export archive.*notes\.txt"):
        capture(path)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="found neither"):
        capture(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CaptureError, match="found 2 GGUF files"):
        capture(tmp_path)
    with pytest.raises(CaptureError, match="no such file or folder"):
        capture(tmp_path / "absent")


def test_a_weight_that_is_no_number_is_named() -> None:
    module = Plain()
    program = capture(module, example_inputs=EXAMPLE).program
    refuse_non_finite(program)
    with torch.no_grad():
        module.embedding.weight[2, 1] = float("nan")
    with pytest.raises(CaptureError, match=r"embedding\.weight has 1 values.*out of 21"):
        capture(program)


def test_a_mask_may_hold_minus_infinity() -> None:
    module = Plain()
    module.register_buffer("mask", torch.full((3,), float("-inf")))
    module.forward = lambda ids: module.embedding(ids) + module.mask  # type: ignore[method-assign]
    assert capture(module, example_inputs=EXAMPLE).kind == "module"


def test_example_inputs_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    (ids,) = load_example_inputs(tmp_path / "ids.npy")
    assert ids.dtype == torch.int64
    torch.save((ids, ids), tmp_path / "two.pt")
    assert len(load_example_inputs(tmp_path / "two.pt")) == 2
    torch.save({"ids": ids}, tmp_path / "named.pt")
    assert torch.equal(load_example_inputs(tmp_path / "named.pt")[0], ids)


def test_example_inputs_that_are_no_ids_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.ones((2, 3)))
    with pytest.raises(CaptureError, match=r"expected integer token ids.*float64 \[2, 3\]"):
        load_example_inputs(tmp_path / "floats.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CaptureError, match=r"objects\.npy: the example inputs cannot be read"):
        load_example_inputs(tmp_path / "objects.npy")
    torch.save(Plain(), tmp_path / "module.pt")
    with pytest.raises(CaptureError, match=r"module\.pt: the example inputs cannot be read"):
        load_example_inputs(tmp_path / "module.pt")
    torch.save(["text"], tmp_path / "text.pt")
    with pytest.raises(CaptureError, match="expected a tensor, or a tuple or dict"):
        load_example_inputs(tmp_path / "text.pt")
