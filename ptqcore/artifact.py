"""What is kept: a folder that restores the quantized model bit for bit.

manifest.json       format version, plugin and task, quantized layers, tied tensors, checksum
model.safetensors   packed integers and scales, and everything that stayed in full precision
assets/             what the task needs to build the model's structure
recipe.yaml, metrics.json, report.html
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptqcore import files
from ptqcore.attachments import FindAttachment
from ptqcore.errors import ArtifactError, PtqError
from ptqcore.finite import check_stored, not_finite
from ptqcore.memory_limit import limited_memory
from ptqcore.on_disk import storage_of, tensors_on_disk, without_memory
from ptqcore.plugin import discover
from ptqcore.reading import one_line, plain_size, read_json
from ptqcore.structure import Structure
from ptqcore.tensor_header import StoredTensor, read_tensor_header
from ptqcore.timesteps import CHILD as TIMESTEPS

FORMAT = 1
MODEL_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
ASSETS_FOLDER = "assets"


class Manifest(Structure):
    """What `manifest.json` holds. `tied` maps a tensor's name to the stored one it is the same as."""

    format: int = FORMAT
    core: str
    plugin: str
    task: str
    tied: dict[str, str]
    sha256: str


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a model with every shared tensor once, and the other names of the shared ones."""
    kept: dict[str, Tensor] = {}
    first: dict[tuple[Any, tuple[int, ...], tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (storage_of(tensor), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor
    return kept, tied


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Put stored tensors, shared ones under all their names, into a module of the same structure.

    Raises:
        KeyError: if a tied tensor is not stored.
        RuntimeError: if names, shapes or kinds of numbers differ.
    """
    state = tensors | {name: tensors[stored] for name, stored in tied.items()}
    for name, own in module.state_dict().items():
        if name in state and state[name].is_floating_point() != own.is_floating_point():
            raise RuntimeError(f"{name!r} is {state[name].dtype} in the file, the model has {own.dtype}")
    module.load_state_dict(state, strict=True, assign=True)


def save(model: nn.Module, folder: Path, plugin: str, task: str, core: str) -> None:
    """Write `model.safetensors` and `manifest.json` into a folder.

    Raises:
        ArtifactError: if the folder cannot be written.
        ModelError: naming the layer, if anything to be stored is NaN or infinite.
    """
    tensors, tied = unique_tensors(model)
    check_stored(tensors)
    files.write_tensors(folder / MODEL_FILE, tensors)
    manifest = Manifest(
        core=core,
        plugin=plugin,
        task=task,
        tied=tied,
        sha256=files.digest(folder / MODEL_FILE),
        **Structure.of(model).model_dump(),
    )
    files.write_text(folder / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, its model file checked against the checksum.

    Raises:
        ArtifactError: if the folder is not a whole artifact.
    """
    try:
        data: Any = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder} is not an artifact: {MANIFEST_FILE} cannot be read ({error})"
        ) from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ArtifactError(
            f"{folder} has artifact format {found!r}; this version of ptqcore reads {FORMAT}"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ArtifactError(f"{folder}/{MANIFEST_FILE}: key {key!r}: {problem['msg']}") from None
    try:
        plain_size(folder / MODEL_FILE)
        actual = files.digest(folder / MODEL_FILE)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder} is not a whole artifact: {error}") from None
    if actual != manifest.sha256:
        raise ArtifactError(f"{folder}/{MODEL_FILE} does not have the checksum that {MANIFEST_FILE} states")
    return manifest


def restore(
    folder: Path,
    build: Callable[[Manifest], nn.Module],
    find: FindAttachment | None = None,
    on_disk: bool = False,
) -> nn.Module:
    """Build the structure, put in the quantized layers and attachments, and load every tensor.

    The structure may not take more memory than its stored tensors need.

    Args:
        folder: the artifact.
        build: makes the structure.
        find: the class of an attachment by its name; by default the installed plugins are asked.
        on_disk: leave all but the small tensors in their file, to be read at each use.

    Raises:
        ArtifactError: if the artifact is not whole or does not fit the structure.
        PluginError: if a plugin whose attachments it has is not installed.
    """
    manifest = read_manifest(folder)
    try:
        stored = read_tensor_header(folder / MODEL_FILE)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}/{MODEL_FILE} cannot be read: {error}") from None
    _check_timesteps(folder, manifest, stored)
    try:
        limit = limited_memory(_numbers(manifest, stored), len(stored), str(folder))
        with limit, without_memory() if on_disk else nullcontext():
            model = build(manifest)
            manifest.build(model, find)
        state = tensors_on_disk(folder / MODEL_FILE) if on_disk else load_file(folder / MODEL_FILE)
        load_tensors(model, state, manifest.tied)
    except PtqError:
        raise
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder}/{MODEL_FILE} cannot be read: {error}") from None
    except Exception as error:  # the structure is whatever the folder says
        raise ArtifactError(f"{folder} does not fit its model: {one_line(error)}") from error
    name = not_finite(model.state_dict())
    if name is not None:
        raise ArtifactError(f"{folder}/{MODEL_FILE}: tensor {name!r} holds NaN or infinite values")
    return model.eval().requires_grad_(False)


def _check_timesteps(folder: Path, manifest: Manifest, stored: Mapping[str, StoredTensor]) -> None:
    """Make sure that there are as many timesteps as the manifest says, before anything is made for each."""
    values = stored.get(f"{TIMESTEPS}.values")
    count = 0 if values is None else values.elements
    specs = [entry.spec for entry in manifest.edges]
    specs += [entry.input for entry in manifest.layers.values() if entry.input is not None]
    claimed = [spec.timesteps for spec in specs if spec.timesteps is not None]
    claimed += [] if manifest.timesteps is None else [manifest.timesteps.count]
    for one in claimed:
        if one != count:
            raise ArtifactError(
                f"{folder}/{MANIFEST_FILE} has {one} timesteps, but {MODEL_FILE} holds {count}"
            )


def _numbers(manifest: Manifest, stored: Mapping[str, StoredTensor]) -> int:
    """Numbers in a model file, codes of weights counted one by one."""
    codes = {f"{path}.weight_codes": entry.weight.bits for path, entry in manifest.layers.items()}
    return sum(
        tensor.elements * (32 // codes[name] if name in codes else 1) for name, tensor in stored.items()
    )


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The quantized model of an artifact, in evaluation mode, on the CPU.

    Args:
        folder: the artifact.
        model: the float model whose structure to use (it is changed in place); by default the
            plugin that made the artifact builds it.

    Raises:
        ArtifactError: if the artifact is not whole, or does not fit the model.
        PluginError: if the plugin that made it is not installed.
    """
    folder = Path(folder)

    def build(manifest: Manifest) -> nn.Module:
        if model is not None:
            return model
        return discover().task(manifest.task, manifest.plugin).build(folder / ASSETS_FOLDER)

    return restore(folder, build)
