"""State dicts from files of others: safetensors, or torch's own format read without running any code."""

import mmap
import pickletools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ptqcore.errors import ModelError
from ptqcore.reading import one_line
from ptqcore.tensor_header import read_tensor_header

_HEADERS = 3  # pickles before that of the object in torch's older format
_NESTED = ("state_dict", "model", "model_state_dict")
_WRAPPER = "module."
_COUNTER = ".num_batches_tracked"


def read_checkpoint(
    path: Path, key: str = "task.checkpoint", harmless: Sequence[Any] = ()
) -> dict[str, Tensor]:
    """The state dict of a checkpoint, without a surrounding `state_dict` or `model` or a prefix `module.`.

    Args:
        path: a .safetensors file, or one that torch.save wrote.
        key: the recipe key that names it, for errors.
        harmless: classes that may lie beside tensors, as for `torch.serialization.safe_globals`.

    Raises:
        ModelError: if there is no such file, it holds anything else, or claims more than it can hold.
    """
    label = f"{key} {str(path)!r}"
    if not path.is_file():
        raise ModelError(f"{label} is no file: give a .safetensors file, or one that torch.save wrote")
    try:
        if path.suffix == ".safetensors":
            read_tensor_header(path)
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(list(harmless)):
                content = _read_torch(path)
    except Exception as error:
        raise ModelError(
            f"{label} cannot be read as a state dict (a damaged file, or one with more than tensors in "
            f"it; torch.save(model.state_dict(), file) makes a good one): {one_line(error, 200)}"
        ) from error
    for name in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(map(_is_entry, content.items())):
        raise ModelError(f"{label} holds no state dict: names and tensors, or those under 'state_dict'")
    _check_sizes(content, path.stat().st_size, label)
    if all(name.startswith(_WRAPPER) for name in content):
        content = {name.removeprefix(_WRAPPER): tensor for name, tensor in content.items()}
    return dict(content)


def put_weights(
    model: nn.Module, state: dict[str, Tensor], path: Path, key: str = "task.checkpoint"
) -> None:
    """Load a state dict strictly; only the batch counters of batch norms, which decide nothing, may lack.

    Args:
        model: takes the weights.
        state: of every parameter and buffer of it.
        path: where the state comes from, for errors.
        key: the recipe key that names it, for errors.

    Raises:
        ModelError: naming the first tensor that is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state = {name: tensor for name, tensor in own.items() if name.endswith(_COUNTER)} | state
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [name for name in own if name in state and state[name].shape != own[name].shape]
    label = f"{key} {str(path)!r} does not fit the model"
    if missing or unexpected:
        kind, names = ("has no tensor", missing) if missing else ("has the unexpected tensor", unexpected)
        count = len(missing) + len(unexpected)
        more = f" ({count - 1} more names differ)" if count > 1 else ""
        raise ModelError(f"{label}: it {kind} {names[0]!r}{more}")
    if misshapen:
        name = misshapen[0]
        raise ModelError(
            f"{label}: {name!r} has the shape {list(state[name].shape)}, the model {list(own[name].shape)}"
        )
    model.load_state_dict(state)


def _is_entry(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], Tensor)


def _read_torch(path: Path) -> Any:
    """What torch.save wrote, in either of its formats."""
    if zipfile.is_zipfile(path):
        _check_records(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Of a mapped file, no more bytes are taken for a text than there are, however many it claims.
        _check_storages(data)
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)  # type: ignore[arg-type]


def _check_storages(data: mmap.mmap) -> None:
    """Refuse storages of more elements than a file of the older format has bytes: memory is taken for them
    before they are read.

    Raises:
        ValueError: if there is one.
    """
    for _ in range(_HEADERS + 1):
        numbers: list[int] = []
        for operation, argument, _ in pickletools.genops(data):  # type: ignore[arg-type]
            if operation.name == "MARK":
                numbers = []
            elif isinstance(argument, int) and operation.name.startswith(("BININT", "INT", "LONG")):
                numbers.append(argument)
            elif operation.name == "BINPERSID" and any(number > len(data) for number in numbers):
                raise ValueError(f"a tensor of {max(numbers)} elements is larger than the file")


def _check_records(path: Path) -> None:
    """Refuse archives whose records are larger than the file: torch.save compresses none.

    Raises:
        ValueError: naming the record.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                raise ValueError(
                    f"its record {record.filename!r} is compressed, or larger than the file: torch.save "
                    "writes neither"
                )


def _check_sizes(content: dict[str, Tensor], size: int, label: str) -> None:
    """Refuse tensors that take more memory than the file has bytes as soon as they are copied."""
    for name, tensor in content.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if (
            not plain
            or tensor.numel() * tensor.element_size() > size
            or max(tensor.shape, default=0) > size
        ):
            raise ModelError(
                f"{label}: its tensor {name!r} of shape {list(tensor.shape)} is larger than the file, or "
                "of another kind than plain numbers"
            )
