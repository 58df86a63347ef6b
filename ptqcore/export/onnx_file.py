"""The graph of an ONNX file, its data checked where it lies beside the file."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ptqcore.errors import ExportError
from ptqcore.reading import one_sentence, plain_size


def read_onnx_graph(path: Path) -> Any:
    """The graph of a file. Data that lies in others is not read, but is where the graph says: in the same
    folder, and not beyond the end.

    Raises:
        ExportError: if it cannot be read.
    """
    onnx = import_module("onnx")
    with one_sentence(f"{path} cannot be read back", ExportError):
        plain_size(path)
        graph = onnx.load(str(path), load_external_data=False).graph
        for tensor in graph.initializer:
            if onnx.external_data_helper.uses_external_data(tensor):
                place = {entry.key: entry.value for entry in tensor.external_data}
                _check_place(place, tensor.name, path.parent)
    return graph


def _check_place(place: Mapping[str, str], name: str, folder: Path) -> None:
    location, offset = place.get("location", ""), int(place.get("offset", 0))
    file = folder / location
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"tensor {name} lies in {location!r}, outside of the folder {folder}")
    size = plain_size(file)
    length = int(place.get("length", size - offset))
    if not 0 <= offset <= offset + length <= size:
        raise ExportError(
            f"tensor {name} lies at {offset} to {offset + length} of {location!r}, which has {size} bytes"
        )
