"""Fixtures that compile: a shop of commands, a toy for it, and toys with a KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cached_toy import Compile, cpu_compiler
from tests.compiling import SMALL, quick
from tests.shop import Shop, archive


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a small toy."""
    return archive(SMALL, tmp_path_factory.mktemp("toy"))


@pytest.fixture
def shop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shop:
    """A folder with an empty one for the output."""
    (tmp_path / "out").mkdir()
    return Shop(tmp_path, capsys, quick("4-8-8"))


@pytest.fixture(scope="session")
def cached_toy(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile a toy with a cache, once in all files that ask for it."""
    return cpu_compiler(tmp_path_factory.mktemp)
