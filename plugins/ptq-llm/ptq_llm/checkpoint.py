"""What exporters of Hugging Face checkpoints share: config.json and model.safetensors, both read back."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptq_llm.experts import EXPERT, kept_as
from ptq_llm.unpack import Array, TensorFile
from ptqcore import (
    Exporter,
    ExportError,
    QuantLinear,
    QuantModule,
    QuantSection,
    Store,
    Task,
    Verification,
    free_memory,
    in_memory,
    is_on_disk,
    one_sentence,
    pieces,
    read_json,
    storage_of,
    write_tensors,
)

_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_PIECE = 2**19  # elements compared at a time


class Layout(Protocol):
    """How config.json says that a layer is stored."""

    def tensors(self) -> set[str]:
        """Names, after the layer's, of the tensors that hold it (its bias apart)."""


L = TypeVar("L", bound=Layout)


class CheckpointExporter(Exporter, Generic[L]):
    """A checkpoint of transformers with quantized linear layers.

    Subclasses say how a layer is stored and named, how config.json says so, and how both are read.
    """

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear):
                raise _not_linear(self.name, name)
            if kept_as(layer) == Conv1D.__name__:
                raise ExportError(
                    f"export {self.name} cannot hold {name}: readers have a Conv1D in its place, and "
                    "quantize linear layers only: remove the export"
                )
            if kept_as(layer) == EXPERT:
                self.check_expert(quant, name)
            self.check_layer(quant, name, layer)

    @abstractmethod
    def check_layer(self, quant: QuantSection, name: str, layer: nn.Linear) -> None:
        """Refuse, before anything is quantized, a layer that the format cannot hold.

        Raises:
            ExportError: naming the layer.
        """

    def check_expert(self, quant: QuantSection, name: str) -> None:
        """Refuse, before anything is quantized, an expert that the format cannot hold: by default any.

        Raises:
            ExportError: naming the layer.
        """
        raise ExportError(
            f"export {self.name} holds no experts, and {name} is one: remove the export, or replace it by "
            "compressed-tensors"
        )

    @abstractmethod
    def refuse(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        """Refuse, before anything is written, quantized layers that the format cannot hold.

        Raises:
            ExportError: naming the layer.
        """

    @abstractmethod
    def layer_tensors(self, layer: QuantLinear) -> dict[str, Tensor]:
        """What a quantized layer [out, in] stores, by the names after its path, without its bias."""

    @abstractmethod
    def quantization_config(self, model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    @abstractmethod
    def find_layout(self, config: dict[str, Any], name: str) -> L | None:
        """How a `quantization_config` says that the layer `name` is stored; None if left alone."""

    @abstractmethod
    def layer_difference(self, file: TensorFile, name: str, layer: QuantLinear, layout: L) -> float:
        """Largest difference between a layer in the file and in the model."""

    def stored_layers(self, model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, QuantLinear]:
        """Quantized layers as the file names and cuts them; by default by their paths."""
        return layers

    def plain_tensors(
        self, model: nn.Module, layers: dict[str, QuantLinear]
    ) -> Iterator[tuple[str, Tensor]]:
        """Everything but quantized weights and grids, by the names in the file; by default its own."""
        return plain_tensors(model, layers)

    def write_config(self, folder: Path, quantization: dict[str, Any]) -> None:
        """Put the `quantization_config` into the task's config.json."""
        write_json(folder / _CONFIG_FILE, _read_config(folder) | {"quantization_config": quantization})

    def notes(self, layers: dict[str, QuantLinear]) -> tuple[str, ...]:
        """Sentences for the report; by default none."""
        return ()

    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        layers = _quantized_layers(model, self.name)
        self.refuse(model, layers)
        task.save_assets(folder)
        parts = self.stored_layers(model, layers)
        with Store(0 if is_on_disk(model) else free_memory(), folder) as store:
            tensors = dict(self.plain_tensors(model, layers))
            for name, layer in parts.items():
                for key, tensor in self.layer_tensors(layer).items():
                    tensors[f"{name}.{key}"] = store.keep(tensor.detach().cpu())
            write_tensors(folder / _WEIGHTS_FILE, tensors, {"format": "pt"})
        self.write_config(folder, self.quantization_config(model, parts))

    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        layers = _quantized_layers(model, self.name)
        with one_sentence(f"{folder} cannot be read back", ExportError):
            return self._compare(model, layers, folder)

    def _compare(self, model: nn.Module, layers: dict[str, QuantLinear], folder: Path) -> Verification:
        """The largest difference between what a folder holds and the model."""
        file = TensorFile(folder / _WEIGHTS_FILE)
        parts = self.stored_layers(model, layers)
        layouts = self._layouts(model, parts, folder)
        known = {f"{name}.{key}" for name, layout in layouts.items() for key in layout.tensors()}
        largest = 0.0
        for name, layer in parts.items():
            largest = max(largest, self.layer_difference(file, name, layer, layouts[name]))
        for name, tensor in self.plain_tensors(model, layers):
            known.add(name)
            largest = max(largest, _stored_difference(file, name, tensor))
        if unknown := sorted(file.names - known):
            raise ExportError(f"tensor {unknown[0]} is in the file but not in the model")
        return Verification(largest, notes=self.notes(layers))

    def _layouts(self, model: nn.Module, layers: dict[str, QuantLinear], folder: Path) -> dict[str, L]:
        """How config.json says that each quantized layer is stored.

        Raises:
            ExportError: if it does not say so for a quantized layer, or does for one that is not.
        """
        config = _read_config(folder).get("quantization_config")
        if config is None:
            raise ExportError(f"{folder / _CONFIG_FILE} has no key 'quantization_config'")
        for name in float_linears(model):
            if self.find_layout(config, name) is not None:
                raise ExportError(f"config.json says that layer {name} is quantized, but it is not")
        layouts = {}
        for name in layers:
            layout = self.find_layout(config, name)
            if layout is None:
                raise ExportError(f"config.json does not say how layer {name} is quantized")
            layouts[name] = layout
        return layouts


def refuse_ragged(
    export: str, name: str, columns: int, size: int | None, key: str = "quant.weights.group_size"
) -> None:
    """Refuse a layer whose groups do not fill its rows; `key` says how large they are.

    Raises:
        ExportError: naming the layer.
    """
    if size is not None and columns % size:
        raise ExportError(
            f"export {export} cannot hold {name}: its {columns} inputs are not a multiple of "
            f"{key} {size}, set another size or add the layer to quant.ignore"
        )


def refuse_new_bias(export: str, name: str, layer: QuantLinear) -> None:
    """Refuse a layer to which a step gave a bias.

    Raises:
        ExportError: naming the layer.
    """
    if layer.has_new_bias:
        raise ExportError(
            f"export {export}: a step gave {name} a bias, which readers of this architecture "
            "would leave out: remove bias-correction, or the export"
        )


def float_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers left in full precision."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as transformers does: indented, and text as it is."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored_difference(file: TensorFile, name: str, tensor: Tensor) -> float:
    """That of a tensor in a file, part by part."""
    largest, first = 0.0, 0
    for piece in pieces(tensor):
        rows = range(first, first := first + len(piece)) if tensor.ndim else None
        largest = max(largest, difference(file.numbers(name, tuple(tensor.shape), rows), piece))
    return largest


def difference(stored: Array, tensor: Tensor) -> float:
    """Largest absolute difference; infinite where only one of the two is NaN."""
    ours = in_memory(tensor).detach().cpu()
    if ours.is_floating_point() and ours.dtype != torch.float64:
        ours = ours.float()
    left, right = stored.reshape(-1), ours.numpy().reshape(-1)
    largest = 0.0
    for start in range(0, left.size, _PIECE):
        a = left[start : start + _PIECE].astype(np.float64)
        b = right[start : start + _PIECE].astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        apart = np.abs(np.where(same, 0, a) - np.where(same, 0, b))
        largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max()))
    return largest


def _quantized_layers(model: nn.Module, export: str) -> dict[str, QuantLinear]:
    """Quantized layers by path.

    Raises:
        ExportError: if there is none, one is not linear, or one is tied to the embedding.
    """
    tied = _tied_output(model)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule):
            continue
        if not isinstance(module, QuantLinear):
            raise _not_linear(export, name)
        if module is tied:
            raise ExportError(
                f"export {export} cannot hold a quantized {name} that is tied to the "
                f"embedding, add {name} to quant.ignore"
            )
        layers[name] = module
    if not layers:
        raise ExportError(f"export {export}: the model has no quantized layer")
    return layers


def _tied_output(model: nn.Module) -> nn.Module | None:
    """The output layer, if the model's configuration ties it to the embedding."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    output: nn.Module | None = model.get_output_embeddings() if tied else None  # type: ignore[operator]
    return output


def _not_linear(export: str, name: str) -> ExportError:
    return ExportError(f"export {export} holds linear layers only, and {name} is not one")


def plain_tensors(model: nn.Module, layers: dict[str, QuantLinear]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are stored under their own name: everything but quantized weights and grids.

    A tied output layer is left out, for readers make it from the embedding. Any other tensor that
    shares memory is copied: a safetensors file refuses memory that is shared.
    """
    grids = {
        f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"
    }
    output = _tied_output(model)
    tied = None if output is None else storage_of(output.get_parameter("weight"))
    seen: set[Any] = set()
    for name, tensor in model.state_dict().items():
        address = storage_of(tensor)
        if name in grids or (address in seen and address == tied):
            continue
        yield name, tensor.clone() if address in seen else tensor
        seen.add(address)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG_FILE
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path} cannot be read: it holds no JSON object")
    return config
