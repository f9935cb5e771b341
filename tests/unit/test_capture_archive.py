"""Archives: what is refused, and that nothing planted in one ever runs."""

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree

from fptq_compiler.capture import capture
from fptq_compiler.capture.archive import load_archive
from fptq_compiler.errors import CaptureError

Parts = dict[str, bytes]
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE = "data/sample_inputs/model.pt"


class Toy(torch.nn.Module):
    """Embedding, a constant, a linear layer: ids [B, S] → [B, S, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4)
        self.linear = torch.nn.Linear(4, 5)
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = self.embedding(ids) + self.offset
        rows, columns = ids.shape
        return self.linear(flat.reshape(rows * columns, 4)).reshape(rows, columns, 5)


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.fixture(scope="module")
def toy() -> Toy:
    torch.manual_seed(3)
    return Toy().eval()


@pytest.fixture(scope="module")
def archive(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dynamic = torch.export.Dim.AUTO
    program = torch.export.export(
        toy, (torch.ones(2, 3, dtype=torch.int64),), dynamic_shapes=({0: dynamic, 1: dynamic},)
    )
    path = tmp_path_factory.mktemp("archive") / "toy.pt2"
    torch.export.save(program, path)
    return path


def read_parts(path: Path) -> Parts:
    with zipfile.ZipFile(path) as zipped:
        return {name.partition("/")[2]: zipped.read(name) for name in zipped.namelist()}


def write_parts(path: Path, parts: Parts, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, data in parts.items():
            zipped.writestr(f"toy/{name}", data)
    return path


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(parts: Parts, name: str, change: Callable[[dict], None]) -> None:
    document = json.loads(parts[name])
    change(document)
    parts[name] = json.dumps(document).encode()


def first_node(document: dict, prefix: str = "") -> dict:
    nodes = document["graph_module"]["graph"]["nodes"]
    return next(node for node in nodes if node["target"].startswith(prefix))


def plant_weight(parts: Parts, marker: Path) -> str:
    edit(parts, WEIGHTS, lambda d: d["config"]["linear.weight"].update(use_pickle=True))
    name = "data/weights/" + json.loads(parts[WEIGHTS])["config"]["linear.weight"]["path_name"]
    parts[name] = pickled(Planted(marker))
    return "linear.weight"


def plant_old_weights(parts: Parts, marker: Path) -> str:
    parts["data/weights/model.pt"] = pickled({"linear.weight": Planted(marker)})
    return "data/weights/model.pt"


def plant_constant(parts: Parts, marker: Path) -> str:
    edit(parts, CONSTANTS, lambda d: d["config"]["offset"].update(use_pickle=True))
    parts["data/constants/tensor_0"] = pickled(Planted(marker))
    return "data/constants/tensor_0"


def plant_opaque_constant(parts: Parts, marker: Path) -> str:
    opaque = {"path_name": "opaque_obj_0", "use_pickle": True}
    edit(parts, CONSTANTS, lambda d: d["config"]["offset"].update(opaque))
    parts["data/constants/opaque_obj_0"] = pickle.dumps(Planted(marker))
    return "opaque_obj_0"


def plant_expression(parts: Parts, marker: Path) -> str:
    def change(document: dict) -> None:
        text = json.dumps(document)
        code = f"open('{marker}', 'w').close()"
        start = text.index('"expr_str": "') + len('"expr_str": "')
        end = text.index('"', start)
        document.clear()
        document.update(json.loads(text[:start] + code + text[end:]))

    edit(parts, MODEL, change)
    return "expr_str"


def plant_target(parts: Parts, marker: Path) -> str:
    """A function of torch that loads native code, as an operator of the graph."""
    edit(parts, MODEL, lambda d: first_node(d).update(target="torch.ops.load_library"))
    return "load_library"


def plant_file_operator(parts: Parts, marker: Path) -> str:
    target = "torch.ops.aten.from_file.default"
    edit(parts, MODEL, lambda d: first_node(d).update(target=target))
    return "from_file"


def plant_node_name(parts: Parts, marker: Path) -> str:
    """Node names are pasted into generated Python."""
    name = f"x = open({str(marker)!r}, 'w'); y"
    edit(parts, MODEL, lambda d: first_node(d).update(name=name))
    return "identifier"


def plant_argument_name(parts: Parts, marker: Path) -> str:
    def change(document: dict) -> None:
        call = document["graph_module"]["module_call_graph"][0]["signature"]
        call["forward_arg_names"] = [f"ids=open({str(marker)!r}, 'w')"]

    edit(parts, MODEL, change)
    return "forward_arg_names"


def plant_guard(parts: Parts, marker: Path) -> str:
    edit(parts, MODEL, lambda d: d.update(guards_code=[f"open({str(marker)!r}, 'w')"]))
    return "guards_code"


def plant_import(parts: Parts, marker: Path) -> str:
    """A tree specification can name a module to import."""

    def change(document: dict) -> None:
        call = document["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
        tree = {"type": "builtins.tuple", "context": context, "children_spec": []}
        call["in_spec"] = json.dumps([1, tree])

    edit(parts, MODEL, change)
    return "in_spec"


def plant_native_code(parts: Parts, marker: Path) -> str:
    parts["data/aotinductor/model/code.so"] = b"\x7fELF"
    return "data/aotinductor/model/code.so"


PLANTS = [
    plant_weight,
    plant_old_weights,
    plant_constant,
    plant_opaque_constant,
    plant_expression,
    plant_target,
    plant_file_operator,
    plant_node_name,
    plant_argument_name,
    plant_guard,
    plant_import,
    plant_native_code,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_planted_code_is_refused_and_does_not_run(
    plant: Callable[[Parts, Path], str], archive: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    parts = read_parts(archive)
    named = plant(parts, marker)
    path = write_parts(tmp_path / "planted.pt2", parts)
    with pytest.raises(CaptureError) as caught:
        capture(path)
    assert named in str(caught.value)
    assert "planted.pt2" in str(caught.value)
    assert not marker.exists()


def test_the_plant_would_run_where_the_author_is_trusted(archive: Path, tmp_path: Path) -> None:
    """The marker is a real side effect: otherwise the tests above would show nothing."""
    marker = tmp_path / "ran"
    parts = read_parts(archive)
    plant_weight(parts, marker)
    path = write_parts(tmp_path / "planted.pt2", parts)
    with pytest.raises(CaptureError, match="cannot read this archive"):
        capture(path, trust_pickle=True)
    assert marker.exists()


@pytest.mark.parametrize("trust_pickle", [False, True])
@pytest.mark.parametrize("write", [pickled, pickle.dumps])
def test_example_inputs_are_never_unpickled(
    write: Callable[[object], bytes], trust_pickle: bool, archive: Path, tmp_path: Path
) -> None:
    """They may hold a cache of transformers, and nobody needs them."""
    marker = tmp_path / "ran"
    parts = read_parts(archive)
    parts[SAMPLE] = write(Planted(marker))
    path = write_parts(tmp_path / "planted.pt2", parts)
    assert capture(path, trust_pickle=trust_pickle).program.example_inputs is None
    assert not marker.exists()


def test_a_cache_in_the_tree_is_never_looked_up(archive: Path, tmp_path: Path) -> None:
    """Its context, which torch would search for types to import, is not even parsed."""
    parts = read_parts(archive)
    leaf = {"type": None, "context": None, "children_spec": []}
    context = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
    kind = "transformers.cache_utils.DynamicCache"
    cache = {"type": kind, "context": context, "children_spec": [leaf]}

    def change(document: dict) -> None:
        call = document["graph_module"]["module_call_graph"][0]["signature"]
        call["out_spec"] = json.dumps([1, cache])

    edit(parts, MODEL, change)
    path = write_parts(tmp_path / "cache.pt2", parts)
    before = dict(_pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE)
    captured = capture(path)
    assert before == _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    assert "antigravity" not in sys.modules
    ids = torch.arange(6).reshape(2, 3)
    (found,) = captured.program.module(check_guards=False)(ids)
    assert found.shape == (2, 3, 5)


def test_round_trip_keeps_names_and_numbers(archive: Path, toy: Toy) -> None:
    captured = capture(archive)
    assert captured.kind == "archive"
    assert sorted(captured.program.state_dict) == [
        "embedding.weight",
        "linear.bias",
        "linear.weight",
    ]
    ids = torch.arange(20).reshape(4, 5) % 11
    found = captured.program.module(check_guards=False)(ids)
    assert torch.equal(found, toy(ids))  # the same kernels on the same numbers


def test_a_rewritten_archive_loads_under_any_name(archive: Path, tmp_path: Path) -> None:
    """The tests above refuse what was planted, not the way the file was written."""
    path = write_parts(tmp_path / "no_extension", read_parts(archive))
    assert capture(path).kind == "archive"


def test_an_archive_without_example_inputs_loads(toy: Toy, tmp_path: Path) -> None:
    program = torch.export.export(toy, (torch.ones(2, 3, dtype=torch.int64),))
    program.example_inputs = None
    path = tmp_path / "bare.pt2"
    torch.export.save(program, path)
    assert read_parts(path)[SAMPLE] == b""
    assert capture(path).kind == "archive"


def test_a_truncated_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.pt2"
    data = archive.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CaptureError, match=r"short\.pt2: the archive is truncated or damaged"):
        capture(path)


def test_a_flipped_byte_is_found_by_its_checksum(archive: Path, tmp_path: Path) -> None:
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as zipped:
        entry = zipped.getinfo("toy/data/weights/weight_0")
    data[entry.header_offset + 30 + len(entry.filename) + len(entry.extra) + 70] ^= 1
    path = tmp_path / "flipped.pt2"
    path.write_bytes(data)
    with pytest.raises(CaptureError, match=r"weight_0.*is damaged"):
        capture(path)


def test_a_compressed_part_is_refused(archive: Path, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "bomb.pt2", read_parts(archive), zipfile.ZIP_DEFLATED)
    with pytest.raises(CaptureError, match="is compressed or claims a wrong size"):
        capture(path)


def test_a_part_that_is_there_twice_is_refused(archive: Path, tmp_path: Path) -> None:
    path = write_parts(tmp_path / "twice.pt2", read_parts(archive))
    with (
        zipfile.ZipFile(path, "a") as zipped,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        zipped.writestr("toy/models/model.json", b"{}")
    with pytest.raises(CaptureError, match=r"'models/model\.json' is there twice"):
        capture(path)


def test_a_tensor_larger_than_its_part_is_refused(archive: Path, tmp_path: Path) -> None:
    def change(document: dict) -> None:
        meta = document["config"]["linear.weight"]["tensor_meta"]
        meta["sizes"] = [{"as_int": 1 << 40}, {"as_int": 4}]

    parts = read_parts(archive)
    edit(parts, WEIGHTS, change)
    path = write_parts(tmp_path / "claims.pt2", parts)
    with pytest.raises(CaptureError, match=r"linear\.weight.*needs 17592186044416 bytes, found"):
        capture(path)


def test_a_missing_weight_is_named(archive: Path, tmp_path: Path) -> None:
    parts = read_parts(archive)
    del parts["data/weights/weight_0"]
    path = write_parts(tmp_path / "missing.pt2", parts)
    with pytest.raises(CaptureError, match=r"'data/weights/weight_0' is missing"):
        capture(path)


def test_text_that_is_not_json_is_named(archive: Path, tmp_path: Path) -> None:
    parts = read_parts(archive)
    parts[MODEL] = b"{not json"
    path = write_parts(tmp_path / "text.pt2", parts)
    with pytest.raises(CaptureError, match=r"models/model\.json' is not JSON"):
        capture(path)


def test_the_old_layout_asks_for_a_new_export(tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("serialized_exported_program.json", b"{}")
        zipped.writestr("version", b"8.7")
    with pytest.raises(CaptureError, match=r"before torch 2\.8.*Export the model again"):
        capture(path)


def test_the_environment_is_left_as_it_was(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    load_archive(archive)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
