"""Checkpoints, ONNX files and import paths of strangers: what they may not do."""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from ptqcore import (
    Block,
    ModelError,
    QuantizedTensor,
    QuantSpec,
    check_imported,
    import_network,
    read_checkpoint,
)
from ptqcore.errors import ExportError
from ptqcore.export.onnx_read import fixed_dimensions, largest_difference

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


def sentence(file: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_checkpoint(file)
    found = str(caught.value)
    assert found.startswith(f"task.checkpoint {str(file)!r}")
    assert "\n" not in found
    return found


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(tmp_path, zipped):
    trap, file = tmp_path / "sprung", tmp_path / "trap.pth"
    torch.save(STATE | {"x": Trap(trap)}, file, _use_new_zipfile_serialization=zipped)
    assert "cannot be read as a state dict" in sentence(file)
    file.write_bytes(pickle.dumps(Trap(trap)))
    assert "cannot be read as a state dict" in sentence(file)
    assert not trap.exists()


def repacked(file: Path, kind: int, **changes: bytes) -> Path:
    """A checkpoint whose records are packed in another way."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, record in records.items():
            archive.writestr(name, changes.get(name.rpartition("/")[2], record))
    return file


def test_an_archive_bomb_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "bomb.pth")
    file = repacked(tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10**5
    assert "is compressed, or larger than the file: torch.save writes neither" in sentence(file)


def test_a_record_of_a_claimed_size(tmp_path):
    file = tmp_path / "claim.pth"
    torch.save(STATE, file)
    content = bytearray(file.read_bytes())
    central = content.rfind(b"PK\x01\x02")
    content[central + 24 : central + 28] = (2**31).to_bytes(4, "little")
    file.write_bytes(content)
    assert "cannot be read as a state dict" in sentence(file)


def test_a_tensor_that_is_larger_than_its_file(tmp_path):
    file = tmp_path / "expanded.pth"
    torch.save({"a": torch.zeros(1).expand(10**9)}, file)
    assert "its tensor 'a' of shape [1000000000] is larger than the file" in sentence(file)
    save_file({"a": torch.zeros(2**20, 0)}, tmp_path / "empty.safetensors")
    assert "its tensor 'a' of shape [1048576, 0] is larger than the file" in sentence(
        tmp_path / "empty.safetensors"
    )


def test_an_older_file_of_a_huge_tensor(tmp_path):
    file = tmp_path / "old.pth"
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(file)["a.weight"], STATE["a.weight"])
    elements = b"\x8a\x08" + (10**12).to_bytes(8, "little")  # a pickled number in the place of another
    file.write_bytes(file.read_bytes().replace(b"K\x06", elements, 1))
    assert "a tensor of 1000000000000 elements is larger than the file" in sentence(file)


def test_other_kinds_of_tensors(tmp_path):
    file = tmp_path / "sparse.pth"
    torch.save({"a": torch.eye(3).to_sparse()}, file)
    assert "or of another kind than plain numbers" in sentence(file)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@given(content=st.binary(max_size=300))
@settings(deadline=None, max_examples=50)
def test_any_bytes_are_refused(tmp_path_factory, name, content):
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(content)
    sentence(file)


@pytest.mark.parametrize("zipped", [True, False])
@given(place=st.floats(0, 1), piece=st.binary(min_size=1, max_size=8))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_bytes_is_read_or_refused(tmp_path, zipped, place, piece):
    file, written = tmp_path / "a.pth", io.BytesIO()
    torch.save(STATE, written, _use_new_zipfile_serialization=zipped)
    whole = written.getvalue()
    at = int(place * (len(whole) - 1))
    file.write_bytes(whole[:at] + piece + whole[at + len(piece) :])
    try:
        read_checkpoint(file)
    except ModelError:
        return


# ONNX


class Product(nn.Module):
    """One quantized layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)
        grid = QuantSpec(bits=8, granularity="channel")
        low, high = self.layer.weight.detach().aminmax(dim=1, keepdim=True)
        record = QuantizedTensor.from_range(self.layer.weight, low, high, grid)
        Block(self, "").quantize_layer("layer", record, None)


def graph(folder: Path, edit: Any = None, beside: bool = False) -> Path:
    """An exported layer; `edit` changes its parts: constants by name, and nodes."""
    layer: Any = Product().layer
    parts: dict[str, Any] = {
        "codes": (layer.quantized_weight.codes.numpy().astype(np.int16) - 128).astype(np.int8),
        "scale": layer.weight_scale.flatten().numpy(),
        "bias": layer.bias.detach().numpy(),
        "nodes": [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["floats"], "dequantize", axis=0),
            helper.make_node("Transpose", ["floats"], ["columns"], perm=[1, 0]),
            helper.make_node("Gemm", ["x", "columns", "bias"], ["y"], "layer#0"),
        ],
    }
    if edit is not None:
        edit(parts)
    given_ = [numpy_helper.from_array(parts[name], name) for name in ("codes", "scale", "bias")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in "xy"]
    model = helper.make_model(helper.make_graph(parts["nodes"], "g", values[:1], values[1:], given_))
    file = folder / "model.onnx"
    options = {"save_as_external_data": True, "location": "data.bin", "size_threshold": 0} if beside else {}
    onnx.save(model, str(file), **options)
    return file


def onnx_sentence(file: Path) -> str:
    with pytest.raises(ExportError) as caught:
        largest_difference(file, Product())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("beside", [False, True])
def test_a_good_file_is_read(tmp_path, beside):
    assert largest_difference(graph(tmp_path, beside=beside), Product()) == 0


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda p: p["nodes"][0].input.__setitem__(1, "floats"), "tensor floats is missing"),
        (lambda p: p["nodes"][1].input.__setitem__(0, "columns"), "cannot be read back"),
        (lambda p: p["nodes"][2].input.__setitem__(1, "nothing"), "tensor nothing is missing"),
        (lambda p: p["nodes"][1].attribute[0].ints.append(7), "cannot be read back"),
        (lambda p: p.update(scale=np.ones((10**6, 1), np.float32)), "has parameters of shape"),
        (
            lambda p: p.update(scale=np.ones(7, np.float32)),
            "has parameters of shape [7] for codes of shape",
        ),
        (lambda p: p["nodes"][0].attribute[0].__setattr__("i", 9), "cannot be read back"),
        (
            lambda p: p["nodes"][0].attribute.append(helper.make_attribute("block_size", 2**60)),
            "has parameters of shape",
        ),
        (lambda p: p["nodes"].pop(), "layer layer is missing"),
    ],
)
def test_graphs_that_make_no_sense(tmp_path, edit, expected):
    assert expected in onnx_sentence(graph(tmp_path, edit))


def test_a_graph_that_shares_a_value_a_million_times_is_walked_once(tmp_path):
    def edit(parts: dict[str, Any]) -> None:
        sums = [helper.make_node("Add", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(60)]
        product = helper.make_node("MatMul", ["x", "columns"], ["y"], "layer#0")
        added = helper.make_node("Add", ["y", "s60"], ["z"])
        parts["nodes"] = [*parts["nodes"][:2], product, added, *sums]

    assert "layer layer has no bias" in onnx_sentence(graph(tmp_path, edit))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("location", "../data.bin", "lies in '../data.bin', outside of the folder"),
        ("location", "/etc/passwd", "lies in '/etc/passwd', outside of the folder"),
        ("location", "nothing.bin", "cannot be read back"),
        ("length", str(2**40), "of 'data.bin', which has"),
        ("offset", str(2**40), "of 'data.bin', which has"),
        ("offset", "-8", "of 'data.bin', which has"),
        ("offset", "a", "cannot be read back"),
    ],
)
def test_data_beside_the_file(tmp_path, key, value, expected):
    file = graph(tmp_path, beside=True)
    model = onnx.load(str(file), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    file.write_bytes(model.SerializeToString())
    assert expected in onnx_sentence(file)


def test_dimensions_of_no_onnx_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match=r"model\.onnx cannot be read back: "):
        fixed_dimensions(tmp_path / "model.onnx", {})


@given(place=st.floats(0, 1), piece=st.binary(min_size=1, max_size=4))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_an_onnx_file_is_read_or_refused(tmp_path, place, piece):
    file = graph(tmp_path)
    whole = file.read_bytes()
    at = int(place * (len(whole) - 1))
    file.write_bytes(whole[:at] + piece + whole[at + len(piece) :])
    try:
        fixed_dimensions(file, {})
        largest_difference(file, Product())
    except ExportError:
        return


# Code that a file names


@pytest.mark.parametrize(
    "path", ["os:abort", "antigravity:fly", "builtins:exec", "torch:os.abort", "pty:spawn"]
)
def test_no_recipe_leads_into_the_standard_library(path):
    with pytest.raises(ModelError, match="leads into Python's own library, which holds no network"):
        import_network(path)
    assert "antigravity" not in sys.modules


def test_an_artifact_names_no_code_that_nobody_has_imported(monkeypatch, tmp_path):
    package = types.ModuleType("mine")
    package.Net = type("Net", (nn.Module,), {"__module__": "mine.networks"})
    package.stolen = torch.save
    refused = "names the code '.*', which nobody has imported: if you trust it, import mine before you load"
    with pytest.raises(ModelError, match=refused):
        check_imported("mine:Net", tmp_path)
    monkeypatch.setitem(sys.modules, "mine", package)
    check_imported("mine:Net", tmp_path)
    for path in ("mine:stolen", "mine:nothing", "mine:"):
        with pytest.raises(ModelError, match=refused):
            check_imported(path, tmp_path)
