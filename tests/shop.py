"""The command line over a folder of inputs: what it says, how it exits, what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fptq_compiler.cli.compile import command
from fptq_compiler.cli.entry import run
from fptq_compiler.recipe import Recipe
from tests.toys import ToyConfig, export_toy

FREE = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}


def archive(config: ToyConfig, folder: Path) -> Path:
    """The toy as a user would save it."""
    path = folder / "toy.pt2"
    torch.export.save(export_toy(config), path)
    return path


def save_export(module: nn.Module, example: Tensor, path: Path) -> Path:
    dynamic = (FREE,) if example.dim() == 2 else ({},)
    program = torch.export.export(
        module.eval(), (example,), dynamic_shapes=dynamic, strict=False
    )
    torch.export.save(program, path)
    return path


@dataclass
class Shop:
    """A folder for inputs and an empty one for the output, and the command line over both."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    recipe: Recipe
    shown: str = ""
    said: str = ""

    @property
    def output(self) -> Path:
        return self.folder / "out" / "toy.onnx"

    def compile(self, model: Path, *words: str | Path, recipe: Recipe | None = None) -> int:
        """Run fptq-compile; keeps what it showed and what it said on stderr."""
        toml = self.folder / "recipe.toml"
        toml.write_text((recipe or self.recipe).to_toml(), encoding="utf-8")
        options = ["--recipe", str(toml), *map(str, words)]
        code = run(command, [str(model), "-o", str(self.output), *options])
        self.shown, self.said = self.capture.readouterr()
        return code

    def nothing_left(self) -> bool:
        """Whether the output's folder is as empty as before: no file, no temporary folder."""
        return list(self.output.parent.iterdir()) == []

    def fails(self, code: int, message: str, model: Path, *words: str | Path, **rest: Any) -> None:
        assert self.compile(model, *words, **rest) == code, self.said
        assert message in self.said
        assert "this is our bug" not in self.said
        assert "Traceback" not in self.said
        assert self.nothing_left()
