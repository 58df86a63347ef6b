"""Artifacts and journals that somebody broke on purpose: one sentence each, before memory is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ptqcore import Block, PtqError, QuantizedTensor, QuantSpec, artifact
from ptqcore.attachments import Attachment, attach
from ptqcore.errors import ArtifactError, ModelError
from ptqcore.files import digest
from ptqcore.journal import BlockResult, Journal
from ptqcore.report.record import BlockRecord
from ptqcore.timesteps import Timesteps

WEIGHT = QuantSpec(bits=4, symmetric=False, granularity="channel")
OF_TIME = QuantSpec(bits=8, granularity="timestep", timesteps=2)


class Shift(Attachment):
    """Adds a constant to every channel."""

    name = "test:shift"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("by", torch.zeros(channels))

    def settings(self) -> dict[str, Any]:
        return {"channels": len(self.get_buffer("by"))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.get_buffer("by")


class Net(nn.Module):
    """Two layers, of which one is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def quantize(model: nn.Module, path: str) -> None:
    layer = model.get_submodule(path)
    low, high = layer.weight.detach().aminmax(dim=1, keepdim=True)
    record = QuantizedTensor.from_range(layer.weight, low, high, WEIGHT)
    quantized = Block(model, path.rpartition(".")[0]).quantize_layer(path, record, OF_TIME)
    quantized.input_quantizer.set_range(-torch.ones(2), torch.ones(2))


def find(name: str) -> type[Attachment]:
    if name != Shift.name:
        raise ArtifactError(f"no attachment {name!r}")
    return Shift


def write(folder: Path) -> Path:
    torch.manual_seed(0)
    model = Net()
    quantize(model, "one")
    attach(model.two, Shift(8))
    Timesteps.of([0, 1], "timestep").attach(model)
    artifact.save(model, folder, "test", "test", "0")
    return folder


def restore(folder: Path) -> nn.Module:
    return artifact.restore(folder, lambda _: Net(), find)


@pytest.fixture
def folder(tmp_path):
    """A good artifact."""
    return write(tmp_path)


def change(folder: Path, edit: Any) -> None:
    """Edit the manifest; its checksum is right afterwards."""
    file = folder / artifact.MANIFEST_FILE
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest | {"sha256": digest(folder / artifact.MODEL_FILE)}))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors, dots written as two underscores; None removes one."""
    state = load_file(folder / artifact.MODEL_FILE)
    for name, tensor in tensors.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / artifact.MODEL_FILE)
    change(folder, lambda manifest: None)


def sentence(folder: Path) -> str:
    """Of an artifact that must be refused; nothing in the folder has changed afterwards."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(PtqError) as caught:
        restore(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_good_one_is_read(folder):
    restored = restore(folder)
    assert restored.one.weight.shape == (8, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "manifest.json cannot be read"),
        ("[" * 5000, "manifest.json cannot be read"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("[]", "has artifact format None"),
        ('{"format": 1e999}', "has artifact format inf"),
        ('{"format": 1}', "manifest.json: key 'layers': Field required"),
    ],
)
def test_manifests_that_are_none(folder, text, expected):
    (folder / artifact.MANIFEST_FILE).write_text(text)
    assert expected in sentence(folder)


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [0, -1, 10**30, float("inf"), "a"])
def test_grids_that_there_are_not(folder, key, value):
    change(folder, lambda manifest: manifest["layers"]["one"]["weight"].update({key: value}))
    assert "key 'layers.one.weight" in sentence(folder)


def test_a_checksum_that_is_wrong(folder):
    (folder / artifact.MODEL_FILE).write_bytes(b"other")
    assert "does not have the checksum that manifest.json states" in sentence(folder)


def test_a_model_file_that_is_none(folder):
    (folder / artifact.MODEL_FILE).write_bytes(b"\xff" * 100)
    change(folder, lambda manifest: None)
    assert "model.safetensors cannot be read: its header has" in sentence(folder)


def test_a_model_file_that_has_no_end(folder):
    (folder / artifact.MODEL_FILE).unlink()
    (folder / artifact.MODEL_FILE).symlink_to("/dev/zero")
    with pytest.raises(
        ArtifactError, match=r"is not a whole artifact: 'model.safetensors' is no plain file"
    ):
        restore(folder)


@pytest.mark.parametrize("count", [3, 10**12])
def test_more_timesteps_than_are_stored(folder, count):
    change(folder, lambda manifest: manifest["timesteps"].update(count=count))
    assert f"manifest.json has {count} timesteps, but model.safetensors holds 2" in sentence(folder)


def test_ranges_of_more_timesteps_than_are_stored(folder):
    change(folder, lambda manifest: manifest["layers"]["one"]["input"].update(timesteps=10**12))
    assert "manifest.json has 1000000000000 timesteps" in sentence(folder)


@pytest.mark.parametrize("size", [10**9, 10**12])
def test_huge_attachments_and_tables_are_not_made(folder, size):
    change(folder, lambda manifest: manifest["attachments"][0]["settings"].update(channels=size))
    assert "describes far larger layers than it holds numbers for" in sentence(folder)
    change(folder, lambda manifest: manifest.update(attachments=[], tables={"two": [size, 10]}))
    assert "describes far larger layers than it holds numbers for" in sentence(folder)


def test_a_huge_structure_is_not_built(folder):
    with pytest.raises(ModelError, match="describes far larger layers than it holds numbers for"):
        artifact.restore(folder, lambda _: nn.Linear(10**6, 10**6), find)
    with pytest.raises(ModelError, match="describes far more layers than it holds tensors for"):
        artifact.restore(folder, lambda _: nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**6))), find)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda m: m["layers"].update({"three": m["layers"]["one"]}), "has no layer 'three'"),
        (lambda m: m["layers"].update({"": m["layers"]["one"]}), "which has no quantized kind"),
        (lambda m: m["attachments"][0].update(settings={"x": 1}), "attachment 'test:shift' of 'two': "),
        (
            lambda m: m["attachments"][0].update(settings={"channels": -1}),
            "attachment 'test:shift' of 'two'",
        ),
        (lambda m: m["attachments"][0].update(path="../two"), "attachment 'test:shift' of '../two'"),
        (lambda m: m["attachments"][0].update(name="os:system"), "no attachment 'os:system'"),
        (lambda m: m.update(tables={"one": [2, 8]}), "which has no quantized kind|table in the place"),
        (
            lambda m: m.update(folded={"one": "two"}),
            "layer 'one' is a WithoutNorm, which has no quantized kind",
        ),
        (lambda m: m.update(tied={"two.weight": "nothing"}), "does not fit its model: 'nothing'"),
    ],
)
def test_structures_that_do_not_fit(folder, edit, expected):
    change(folder, edit)
    found = sentence(folder)
    assert any(part in found for part in expected.split("|")), found


def test_scales_that_are_not_finite(folder):
    for value in (torch.nan, torch.inf):
        change_tensors(folder, one__weight_scale=torch.full((8, 1), value))
        assert "tensor 'one.weight_scale' holds NaN or infinite values" in sentence(folder)


def test_numbers_of_another_kind(folder):
    change_tensors(folder, one__weight_scale=torch.ones(8, 1, dtype=torch.int64))
    assert "'one.weight_scale' is torch.int64 in the file, the model has torch.float32" in sentence(folder)


def test_tensors_that_are_missing_or_misshapen(folder):
    change_tensors(folder, one__weight_codes=torch.zeros(8, 5, dtype=torch.int32))
    assert "does not fit its model: " in sentence(folder)
    change_tensors(folder, one__weight_codes=None)
    assert "does not fit its model: " in sentence(folder)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_byte_is_read_or_refused(folder, data):
    name = data.draw(st.sampled_from([artifact.MANIFEST_FILE, artifact.MODEL_FILE]))
    whole = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    piece = data.draw(st.binary(max_size=8))
    (folder / name).write_bytes(whole[:place] + piece + whole[place + len(piece) :])
    try:
        if name == artifact.MODEL_FILE:
            change(folder, lambda manifest: None)
        restore(folder)
    except PtqError:
        pass
    finally:
        write(folder)


# Journals


def block() -> Block:
    torch.manual_seed(0)
    return Block(nn.Sequential(nn.Sequential(nn.Linear(8, 8))), "0")


@pytest.fixture
def journal(tmp_path):
    """A journal with one finished block."""
    one = block()
    quantize(one.model, "0.0")
    attach(one.model[0][0], Shift(8))
    result = BlockResult(BlockRecord("0", 0.1, 1.0, 10), [])
    Journal(tmp_path, {"recipe": "1"}, False, find).save(0, one, result, {})
    return tmp_path


def again(folder: Path) -> Journal:
    return Journal(folder, {"recipe": "1"}, True, find)


def test_a_good_journal_is_read(journal):
    one = block()
    assert again(journal).has(0, one)
    again(journal).restore(0, one)
    assert type(one.model[0][0]).__name__ == "QuantLinear"


@pytest.mark.parametrize("text", ["", "[]", "[" * 5000, "3"])
def test_a_journal_that_is_none(journal, text):
    (journal / "journal.json").write_text(text)
    with pytest.raises(ArtifactError, match="is damaged: run again without --resume"):
        again(journal)
    assert (journal / "block-0000.safetensors").exists()  # nothing that was finished is lost


@pytest.mark.parametrize("text", ["", "[]", "[" * 5000, "{}", '{"path": "0", "sha256": "0"}'])
def test_a_block_that_cannot_be_read_is_not_finished(journal, text):
    (journal / "block-0000.json").write_text(text)
    assert not again(journal).has(0, block())


def test_tensors_that_cannot_be_read_are_not_finished(journal):
    (journal / "block-0000.safetensors").write_bytes(b"")
    assert not again(journal).has(0, block())


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tied", {"0.weight": "x"}, "does not fit block '0': run again without --resume"),
        ("quantized", {}, "does not fit block '0': run again without --resume"),
        ("tables", {"0.0": [10**12, 8]}, "describes far larger layers|table in the place|has no quantized"),
        ("attachments", [], "does not fit block '0': run again without --resume"),
    ],
)
def test_a_block_that_does_not_fit(journal, key, value, sentence):
    file = journal / "block-0000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    before = (journal / "block-0000.safetensors").read_bytes()
    with pytest.raises(PtqError, match=sentence):
        again(journal).restore(0, block())
    assert (journal / "block-0000.safetensors").read_bytes() == before
