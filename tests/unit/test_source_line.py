"""Which frame of a stack trace is the model's own."""

from __future__ import annotations

from fptq_compiler.source_line import SourceLine, model_frame

MODEL = 'File "/home/me/model.py", line 12, in forward'
LINEAR = 'File "/usr/lib/site-packages/torch/nn/modules/linear.py", line 134, in forward'
DISPATCH = 'File "/usr/lib/site-packages/torch/_ops.py", line 819, in __call__'
GENERATED = 'File "<eval_with_key>.5", line 9, in forward'
PROJECT = 'File "/home/me/torch/model.py", line 3, in attend'


def trace(*frames: str) -> str:
    return "\n".join(f"  {frame}\n    return x" for frame in frames)


def test_the_innermost_frame_outside_torch() -> None:
    assert model_frame(trace(MODEL, LINEAR, DISPATCH)) == MODEL
    assert model_frame(trace(MODEL, GENERATED)) == MODEL
    assert model_frame(trace(MODEL, PROJECT, LINEAR)) == PROJECT  # a folder named torch


def test_torch_alone_is_better_than_nothing() -> None:
    assert model_frame(trace(LINEAR, DISPATCH)) == DISPATCH
    assert model_frame("") == ""


def test_a_line_is_read_and_shown_by_its_file_name() -> None:
    line = SourceLine.read(f"  {MODEL}\n    return self.layer(x)")
    assert line == SourceLine("/home/me/model.py", 12, "forward")
    assert str(line) == "model.py:12 in forward"
    windows = SourceLine.read('File "C:\\me\\model.py", line 7, in <lambda>')
    assert str(windows) == "model.py:7 in <lambda>"
    assert SourceLine.read("no frame here") is None
