"""What makes a model of its kind a quantized one, apart from tensors: described, and built again."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ptqcore.attachments import AttachmentEntry, FindAttachment, build_attachments, describe_attachments
from ptqcore.dataflow import Site
from ptqcore.edges import ActivationQuantizers, quantizers_of
from ptqcore.errors import ArtifactError, ModelError
from ptqcore.folding import fold_structure, folded_norms
from ptqcore.modules import QuantModule, quantized_class, replace_module
from ptqcore.placement import Edge
from ptqcore.plugin import discover
from ptqcore.spec import QuantSpec
from ptqcore.tables import replace_by_table, tables_in
from ptqcore.timesteps import Timesteps, Unseen, timesteps_of


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
