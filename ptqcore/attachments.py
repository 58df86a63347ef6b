"""Attachments: small functions that stay in the deployed model, in front of a module or behind it.

A method that cannot be folded into weights (an online rotation, channels that are split and merged, an
affine map on a residual) attaches what it needs to a module. Artifacts and journals describe
attachments by name and settings, and plugins bring their classes, so that what was attached is there
again when a model is restored.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ptqcore.errors import ArtifactError, ModelError, PtqError
from ptqcore.reading import one_line

CHILD = "attachments"

Place = Literal["input", "second input", "output"]


class Attachment(nn.Module, ABC):
    """A function of one tensor. Subclasses set `name`, `plugin:name` as the plugin lists it.

    Tensors that it needs are buffers; linear layers inside would be quantized.
    """

    name: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values that, as keywords, make an attachment of the same structure; buffers are loaded."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


FindAttachment = Callable[[str], type[Attachment]]


class AttachmentEntry(BaseModel):
    """Where an attachment is, and what makes it."""

    model_config = ConfigDict(extra="forbid")

    path: str
    place: Place
    name: str
    settings: dict[str, Any]


class Attachments(nn.ModuleList):
    """The attachments of one module, in the order in which they are applied."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []

    def items(self) -> Iterator[tuple[Place, Attachment]]:
        """Each with its place."""
        return zip(self.places, self, strict=True)  # type: ignore[arg-type]


def attach(module: nn.Module, attachment: Attachment, place: Place = "input") -> None:
    """Compute an attachment on a module's first or second positional input, or on its output tensor,
    behind what is attached there already."""
    if attachments_of(module) is None:
        module.add_module(CHILD, Attachments())
        module.register_forward_pre_hook(_change_inputs)
        module.register_forward_hook(_change_output)
    attachments = attachments_of(module)
    assert attachments is not None
    attachments.append(attachment)
    attachments.places.append(place)


def attachments_of(module: nn.Module) -> Attachments | None:
    """What is attached to a module."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Attachments) else None


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Attach to a module what is attached to the one that it replaces."""
    attachments = attachments_of(old)
    if attachments is not None:
        for place, attachment in attachments.items():
            attach(new, attachment, place)


def _change_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    changed = list(args)
    for place, attachment in attachments_of(module).items():  # type: ignore[union-attr]
        if place == "output":
            continue
        position = ("input", "second input").index(place)
        if position >= len(changed):
            raise ModelError(
                f"{attachment.name} changes the {place} of a {type(module).__name__}, which is called "
                "without that as a positional argument: leave out what attaches it"
            )
        changed[position] = attachment(changed[position])
    return tuple(changed)


def _change_output(module: nn.Module, args: Any, output: Any) -> Any:
    for place, attachment in attachments_of(module).items():  # type: ignore[union-attr]
        if place == "output":
            output = attachment(output)
    return output


def describe_attachments(module: nn.Module, prefix: str = "") -> list[AttachmentEntry]:
    """All attachments inside a module."""
    found = []
    for path, child in module.named_modules(prefix=prefix):
        attachments = attachments_of(child)
        if attachments is not None:
            found += [
                AttachmentEntry(path=path, place=place, name=one.name, settings=one.settings())
                for place, one in attachments.items()
            ]
    return found


def build_attachments(model: nn.Module, entries: list[AttachmentEntry], find: FindAttachment) -> None:
    """Attach what is described, in place of anything attached to those modules before.

    Raises:
        ArtifactError: if the model has no such module, or the settings do not fit the attachment.
        PluginError: if no installed plugin brings an attachment of that name.
    """
    cleared: set[str] = set()
    for entry in entries:
        kind = find(entry.name)
        try:
            module = model.get_submodule(entry.path)
            attachment = kind(**entry.settings)
        except PtqError:
            raise
        except Exception as error:  # the settings are whatever a file says
            raise ArtifactError(f"attachment {entry.name!r} of {entry.path!r}: {one_line(error)}") from None
        attachments = attachments_of(module)
        if attachments is not None and entry.path not in cleared:
            attachments.places.clear()
            del attachments[:]
        cleared.add(entry.path)
        attach(module, attachment, entry.place)


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module as it computes what has already passed its attachments: its parameters are shared."""
    plain = copy(module)
    plain._forward_pre_hooks, plain._forward_hooks = OrderedDict(), OrderedDict()
    return plain
