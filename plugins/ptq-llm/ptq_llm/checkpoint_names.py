"""What a checkpoint calls the tensors of a model, and how it cuts them.

transformers merges what checkpoints keep apart, the projections of every expert above all, and reverts
that when it saves a model. Readers of quantized checkpoints ask for the names and the pieces of the
checkpoint. Which rows of a layer a piece holds is found by reverting row numbers.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ptq_llm.experts import ExpertBank
from ptqcore import ExportError, QuantLinear

_WEIGHT = ".weight"

Piece = tuple[str, Tensor]  # the path of a layer, and which of its rows


def banks_of(model: nn.Module) -> dict[str, ExpertBank]:
    """The projections of all experts of a layer, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ExpertBank)}


def stored_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names of the checkpoint."""
    return dict(revert_weight_conversion(model, tensors))  # type: ignore[arg-type]


def stored_paths(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The names of the checkpoint for layers at some paths of the model."""
    empty = {path + _WEIGHT: torch.empty(0, 1) for path in paths}
    return [name.removesuffix(_WEIGHT) for name in stored_tensors(model, empty)]


def stored_layers(model: nn.Module, layers: Mapping[str, QuantLinear]) -> dict[str, QuantLinear]:
    """Quantized layers by the names of the checkpoint and cut as it is; those of experts come first.

    Arguments and errors are those of `stored_pieces`.
    """
    pieces = stored_pieces(model, layers)
    return {name: _rows(layers[path], rows) for name, (path, rows) in pieces.items()}


def stored_pieces(model: nn.Module, layers: Mapping[str, nn.Linear | QuantLinear]) -> dict[str, Piece]:
    """What the checkpoint keeps in a tensor each, by its names; experts come first.

    Args:
        model: a model of transformers.
        layers: linear layers of it, by path, quantized or not; all of its experts must be among them.

    Raises:
        ExportError: if a tensor of the checkpoint is not made of rows of one layer.
    """
    found: dict[str, Piece] = {}
    alone = {path: layer.out_features for path, layer in layers.items()}
    for path, bank in banks_of(model).items():
        members = [f"{path}.{index}" for index in range(len(bank))]
        size = {alone.pop(member) for member in members}.pop()
        _add(found, _pieces(model, path, _row_numbers(len(bank), size, bank.transposed), members))
    for path, size in alone.items():
        _add(found, _pieces(model, path + _WEIGHT, _row_numbers(1, size, False)[0], [path]))
    return found


def _row_numbers(count: int, size: int, transposed: bool) -> Tensor:
    """Numbers [count, size, 1] of the rows of layers of one size; [count, 1, size] if transposed."""
    numbers = torch.arange(count * size).view(count, size, 1)
    return numbers.mT if transposed else numbers


def _pieces(model: nn.Module, name: str, numbers: Tensor, paths: list[str]) -> dict[str, Piece]:
    """The pieces, by their names in the checkpoint, of the tensor `name` that holds layers of one size."""
    size, found = numbers.numel() // len(paths), {}
    for stored, piece in stored_tensors(model, {name: numbers}).items():
        owners = piece.unique() // size
        if piece.ndim != 2 or piece.shape[1] != 1 or (owners != owners[0]).any():
            raise _cannot(stored)
        found[stored.removesuffix(_WEIGHT)] = paths[int(owners[0])], piece.flatten() % size
    return found


def _add(found: dict[str, Piece], pieces: dict[str, Piece]) -> None:
    for name in pieces.keys() & found.keys():
        raise _cannot(name)
    found.update(pieces)


def _cannot(name: str) -> ExportError:
    return ExportError(
        f"checkpoints of this architecture keep {name} in one tensor, so that its layers cannot be "
        "exported each on its own: remove the export"
    )


def _rows(layer: QuantLinear, rows: Tensor) -> QuantLinear:
    """A layer that has some rows of another; that one itself if it has them all, in order."""
    if torch.equal(rows, torch.arange(layer.out_features)):
        return layer
    dtype, has_bias = layer.weight_scale.dtype, layer.bias is not None
    outline = nn.Linear(layer.in_features, len(rows), bias=has_bias, device="meta", dtype=dtype)
    inputs = layer.input_quantizer
    part = QuantLinear(outline, layer.weight_spec, None if inputs is None else inputs.spec)
    part.input_quantizer = inputs
    part.weight_codes = layer.weight_codes[rows]
    per_row = layer.weight_spec.granularity != "tensor"
    kept = rows if per_row else slice(None)
    part.weight_scale = layer.weight_scale[kept].clone()  # files refuse memory that is shared
    if layer.weight_zero_point is not None:
        part.weight_zero_point = layer.weight_zero_point[kept].clone()
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias[rows], requires_grad=False)
    return part.eval()
