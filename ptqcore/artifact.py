"""What is kept: a folder that restores the quantized model bit for bit.

manifest.json       format version, plugin and task, quantized layers, tied tensors, checksum
model.safetensors   packed integers and scales, and everything that stayed in full precision
assets/             what the task needs to build the model's structure
recipe.yaml, metrics.json, report.html
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ptqcore import files
from ptqcore.attachments import AttachmentEntry, FindAttachment, build_attachments, describe_attachments
from ptqcore.dataflow import Site
from ptqcore.edges import ActivationQuantizers, quantizers_of
from ptqcore.errors import ArtifactError, ModelError, PtqError
from ptqcore.finite import check_stored
from ptqcore.folding import fold_structure, folded_norms
from ptqcore.memory_limit import limited_memory
from ptqcore.modules import QuantModule, quantized_class, replace_module
from ptqcore.on_disk import storage_of, tensors_on_disk, without_memory
from ptqcore.placement import Edge
from ptqcore.plugin import discover
from ptqcore.reading import one_line, plain_size, read_json
from ptqcore.spec import QuantSpec
from ptqcore.tables import replace_by_table, tables_in
from ptqcore.tensor_header import StoredTensor, read_tensor_header
from ptqcore.timesteps import CHILD as TIMESTEPS
from ptqcore.timesteps import Timesteps, Unseen, timesteps_of

FORMAT = 1
MODEL_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
ASSETS_FOLDER = "assets"


class LayerEntry(BaseModel):
    """A quantized layer: the grid of its weight, and of its input if that is quantized; whether it has
    a bias (a step may have given it one), and whether the scales of its input and output are known."""

    model_config = ConfigDict(extra="forbid")

    weight: QuantSpec
    input: QuantSpec | None
    bias: bool = False
    input_scale: bool = False
    output_scale: bool = False


class EdgeEntry(BaseModel):
    """A quantized activation: its place, as in `Site` and `Edge`, and its grid."""

    model_config = ConfigDict(extra="forbid")

    owner: str
    call: int
    function: str
    ordinal: int
    side: Literal["input", "output"]
    index: int
    spec: QuantSpec

    @classmethod
    def of(cls, edge: Edge, spec: QuantSpec) -> "EdgeEntry":
        """The entry of an edge."""
        site = edge.site
        return cls(
            owner=site.owner,
            call=site.call,
            function=site.name,
            ordinal=site.ordinal,
            side=edge.side,
            index=edge.index,
            spec=spec,
        )

    @property
    def edge(self) -> Edge:
        """The edge of the entry."""
        return Edge(Site(self.owner, self.call, self.function, self.ordinal), self.side, self.index)


class TimestepsEntry(BaseModel):
    """What makes the model's `Timesteps`; their values are stored with its tensors."""

    model_config = ConfigDict(extra="forbid")

    count: int
    argument: str
    unseen: Unseen


class Structure(BaseModel):
    """What makes a model of its kind a quantized one, apart from tensors; JSON. `tables` are the shapes of
    tables in the place of layers; `folded` maps a batch norm to the layer that it was folded into."""

    model_config = ConfigDict(extra="forbid")

    layers: dict[str, LayerEntry]
    tables: dict[str, tuple[int, ...]] = {}
    edges: list[EdgeEntry] = []
    attachments: list[AttachmentEntry] = []
    timesteps: TimestepsEntry | None = None
    folded: dict[str, str] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        """That of a quantized model."""
        timesteps = timesteps_of(model)
        return cls(
            layers=describe_layers(model),
            tables=describe_tables(model),
            edges=describe_edges(model),
            attachments=describe_attachments(model),
            timesteps=None if timesteps is None else TimestepsEntry(**timesteps.settings()),
            folded=folded_norms(model),
        )

    def build(self, model: nn.Module, find: FindAttachment | None = None) -> None:
        """Make a float model of the same kind such a quantized one, its new tensors still empty.

        Args:
            model: changed in place.
            find: the class of an attachment by its name; by default the installed plugins are asked.

        Raises:
            ArtifactError: if the model has not the layers that are described.
            PluginError: if a plugin whose attachments it has is not installed.
        """
        _build_folded(model, self.folded)
        build_layers(model, self.layers)
        build_tables(model, self.tables)
        build_attachments(model, self.attachments, find or discover().attachment)
        if self.edges:
            ActivationQuantizers({entry.edge: entry.spec for entry in self.edges}).attach(model)
        if self.timesteps is not None:
            Timesteps(**self.timesteps.model_dump()).attach(model)


class Manifest(Structure):
    """What `manifest.json` holds. `tied` maps a tensor's name to the stored one it is the same as."""

    format: int = FORMAT
    core: str
    plugin: str
    task: str
    tied: dict[str, str]
    sha256: str


def describe_layers(module: nn.Module, prefix: str = "") -> dict[str, LayerEntry]:
    """The quantized layers inside a module, by path."""
    return {
        path: LayerEntry(
            weight=layer.weight_spec,
            input=None if layer.input_quantizer is None else layer.input_quantizer.spec,
            bias=layer.bias is not None,
            input_scale=layer.input_scale is not None,
            output_scale=layer.output_scale is not None,
        )
        for path, layer in module.named_modules(prefix=prefix)
        if isinstance(layer, QuantModule)
    }


def build_layers(model: nn.Module, layers: dict[str, LayerEntry]) -> None:
    """Replace float layers by empty quantized ones, as described.

    Raises:
        ArtifactError: if the model has no such layer.
    """
    for path, entry in layers.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise ArtifactError(f"the model has no layer {path!r} that the artifact quantizes") from None
        kind = quantized_class(layer)
        if kind is None:
            raise ArtifactError(f"layer {path!r} is a {type(layer).__name__}, which has no quantized kind")
        quantized = kind(layer, entry.weight, entry.input)
        if entry.bias:
            quantized.ensure_bias()
        if entry.input_scale:
            quantized.input_scale = torch.ones(1)
        if entry.output_scale:
            quantized.output_scale = torch.ones(1)
        replace_module(model, path, quantized.train(layer.training))


def describe_tables(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of the tables inside a module, by path."""
    return {path: tuple(one.table.shape) for path, one in tables_in(module, prefix).items()}


def build_tables(model: nn.Module, tables: dict[str, tuple[int, ...]]) -> None:
    """Replace float layers by empty tables, as described.

    Raises:
        ArtifactError: if the model has no such layer.
    """
    for path, shape in tables.items():
        try:
            replace_by_table(
                model, path, model.get_submodule(path).get_parameter("weight").new_empty(shape)
            )
        except (AttributeError, ModelError) as error:
            raise ArtifactError(f"the artifact has a table in the place of {path!r}: {error}") from None


def describe_edges(model: nn.Module) -> list[EdgeEntry]:
    """The quantized activations of a model."""
    quantizers = quantizers_of(model)
    return [] if quantizers is None else [EdgeEntry.of(*item) for item in quantizers.specs().items()]


def _build_folded(model: nn.Module, folded: dict[str, str]) -> None:
    try:
        fold_structure(model, folded)
    except AttributeError as error:
        raise ArtifactError(f"the model lacks a folded batch norm of the artifact: {error}") from None


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
    _check_scales(folder, model)
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


def _check_scales(folder: Path, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, QuantModule) and not bool(module.weight_scale.isfinite().all()):
            raise ArtifactError(f"{folder}/{MODEL_FILE}: layer {path!r} has a scale that is not finite")


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
