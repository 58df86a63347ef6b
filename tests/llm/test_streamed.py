"""Models whose weights stay on disk: the same results, with one block in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny_lm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ptqcore
from ptq_llm import plugin
from ptqcore import (
    Block,
    Calibration,
    Dataflow,
    ModelError,
    Plugin,
    PtqError,
    Step,
    quantize,
    read_tensor_header,
)
from ptqcore.on_disk import OnDisk
from ptqcore.plugin import Installed, Registry

_LARGE = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in two shards; its matrices are large enough to stay on disk."""
    folder = tiny_lm.save(tmp_path_factory.mktemp("model"), **_LARGE)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, Any]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[f"model-{1 + index % 2}.safetensors"][name] = tensor
    for file, part in shards.items():
        save_file(part, folder / file, {"format": "pt"})
    places = {name: file for file, part in shards.items() for name in part}
    index_file = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


_PER_TOKEN = {"bits": 8, "granularity": "token", "dynamic": True}
STEPS = {
    "round": (["round"], {}),
    "smoothquant": (
        ["smoothquant", "round"],
        {"activations": {"bits": 8, "granularity": "token", "dynamic": True}},
    ),
    "os-plus": (["os-plus", "round"], {"activations": {"bits": 8}}),
    "gptq": (["asymmetric-calibration", "clip", "gptq"], {}),
    "brecq": ([{"brecq": {"iterations": 10}}], {}),
}


def _bytes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))]


@pytest.mark.parametrize("name", STEPS)
def test_the_bytes_are_those_of_a_run_in_memory(name: str, model: Path, tmp_path: Path) -> None:
    steps, quant = STEPS[name]
    export = ["compressed-tensors"] if name in ("round", "gptq") else []
    for stream in (True, False):
        recipe = tiny_lm.recipe(model, tmp_path, quant, steps, export, stream=stream)
        quantize(recipe, "llm", tmp_path / str(stream))
    assert len(_bytes(tmp_path / "True")) == 1 + len(export)
    assert _bytes(tmp_path / "True") == _bytes(tmp_path / "False")


class Watch(Step):
    """Says what lies in memory, and stops once where it is told to."""

    name = "watch"
    seen: ClassVar[list[tuple[int, int]]] = []
    stops = False

    def block(self, block: Block, calibration: Calibration) -> None:
        inside = {id(tensor) for tensor in (*block.module.parameters(), *block.module.buffers())}
        everything = [*block.model.parameters(), *block.model.buffers()]
        held = [tensor for tensor in everything if not isinstance(tensor, OnDisk)]
        self.seen.append(
            (
                sum(tensor.nbytes for tensor in held if id(tensor) in inside),
                sum(tensor.nbytes for tensor in held if id(tensor) not in inside),
            )
        )
        if self.stops and len(self.seen) == 3:
            raise KeyboardInterrupt


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Watch, "seen", [])
    monkeypatch.setattr(Watch, "stops", False)
    steps = {"watch": f"{__name__}:Watch", "halve": f"{__name__}:Halve"}
    watching = Installed("watching", "ptq-watching", "1.0", Plugin(name="watching", steps=steps))
    return Registry([Installed("llm", "ptq-llm", "1.0", plugin), watching])


def test_one_block_is_in_memory(model: Path, tmp_path: Path, watched: Any) -> None:
    recipe = tiny_lm.recipe(model, tmp_path, None, ["watching:watch", "round"], stream=True)
    quantize(recipe, "llm", tmp_path / "out", registry=watched)
    tensors = [read_tensor_header(file) for file in model.glob("*.safetensors")]
    named = [(name, stored.nbytes) for part in tensors for name, stored in part.items()]
    for index, (inside, outside) in enumerate(Watch.seen):
        block = sum(size for name, size in named if name.startswith(f"model.layers.{index}."))
        assert inside == block
        assert outside < block / 5  # norms, biases, scales and tables
    assert len(Watch.seen) == 3


def test_an_interrupted_run_goes_on_to_the_same_bytes(model: Path, tmp_path: Path, watched: Any) -> None:
    recipe = tiny_lm.recipe(model, tmp_path, None, ["watching:watch", "gptq"], stream=True)
    quantize(recipe, "llm", tmp_path / "whole", registry=watched)
    Watch.seen, Watch.stops = [], True
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, "llm", tmp_path / "cut", registry=watched)
    Watch.stops = False
    quantize(recipe, "llm", tmp_path / "cut", resume=True, registry=watched)
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "whole")


def _refused(recipe: Any, folder: Path) -> str:
    with pytest.raises(PtqError) as caught:
        quantize(recipe, "llm", folder / "out")
    return str(caught.value)


class Halve(Step):
    """Writes into weights before the walk."""

    name = "halve"

    def prepare(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> None:
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(0.5)


def test_a_step_that_writes_into_weights_outside_of_the_block_is_refused(
    model: Path, tmp_path: Path, watched: Any
) -> None:
    recipe = tiny_lm.recipe(model, tmp_path, None, ["watching:halve", "round"], stream=True)
    with pytest.raises(ModelError, match=r"lies on disk .* needs the whole model in memory"):
        quantize(recipe, "llm", tmp_path / "out", registry=watched)


def test_a_missing_tensor_is_named(model: Path, tmp_path: Path) -> None:
    folder = tiny_lm.save(tmp_path / "model", **_LARGE)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = _refused(tiny_lm.recipe(folder, tmp_path, stream=True), tmp_path)
    assert (
        "1 tensors are missing under their names in the model, the first is model.layers.1.mlp.up" in said
    )


def test_a_tensor_of_another_shape_is_named(model: Path, tmp_path: Path) -> None:
    folder = tiny_lm.save(tmp_path / "model", **_LARGE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(7, 160)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = _refused(tiny_lm.recipe(folder, tmp_path, stream=True), tmp_path)
    assert "model.layers.1.mlp.up_proj.weight has shape [7, 160] in the file, not [320, 160]" in said


def test_models_without_linear_layers_are_refused(tmp_path: Path) -> None:
    folder = tiny_lm.save(tmp_path / "model", "gpt2")
    said = _refused(tiny_lm.recipe(folder, tmp_path, stream=True), tmp_path)
    assert "is no linear layer, and cannot be made one" in said
    assert "task.stream to false" in said


@pytest.mark.parametrize("key", ["text", "calibration"])
def test_a_model_on_disk_writes_no_text(model: Path, tmp_path: Path, key: str) -> None:
    said = _refused(tiny_lm.recipe(model, tmp_path, stream=True, **{key: "self"}), tmp_path)
    assert f"task.{key} is 'self', but the weights of the model lie on disk" in said


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    recipe = tiny_lm.recipe(tmp_path / "model.gguf", tmp_path, stream=True)
    with pytest.raises(ModelError, match=r"task.stream is true, but .* is a GGUF file"):
        quantize(recipe, "llm", tmp_path / "out")


def test_what_memory_has_no_room_for_stays_on_disk(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ptq_llm import models, streamed

    assert not ptqcore.is_on_disk(models.load(str(model), torch.float32, stream=None).model)
    numbers = ptqcore.read_weights(model).numbers
    monkeypatch.setattr(streamed, "free_memory", lambda: 8 * numbers - 2)
    assert ptqcore.is_on_disk(models.load(str(model), torch.float32, stream=None).model)
    assert not ptqcore.is_on_disk(models.load(str(model), torch.bfloat16, stream=None).model)
