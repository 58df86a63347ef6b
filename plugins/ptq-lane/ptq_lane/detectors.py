"""Lane detectors by family: the network, how it wants its images, and what reads its outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq_lane.adapter import Adapter
from ptq_lane.lanes import Frame
from ptq_lane.lstr.checkpoint import load as load_lstr
from ptq_lane.lstr.network import LSTR
from ptq_lane.lstr.variants import MEAN, STD, find_variant
from ptq_lane.networks.images import HEIGHT, WIDTH
from ptq_lane.openmmlab import loading as openmmlab
from ptq_lane.openmmlab.description import Description
from ptq_lane.preprocess import Preprocess
from ptqcore import (
    ModelError,
    check_imported,
    import_network,
    import_object,
    nearest,
    put_weights,
    read_checkpoint,
)

WEIGHTS = Path(__file__).parent / "weights"
LSTR_FAMILY = "lstr"
_SMALL = {
    "segmentation": ("segmentation:Segmentation", "segmentation:SegmentationNet"),
    "row-anchor": ("row_anchor:RowAnchor", "row_anchor:RowAnchorNet"),
    "anchor": ("anchor:Anchor", "anchor:AnchorNet"),
    "keypoint": ("keypoint:Keypoint", "keypoint:KeypointNet"),
    "curve": ("curve:Curve", "curve:CurveNet"),
}
FAMILIES = (*_SMALL, LSTR_FAMILY)


@dataclass(frozen=True)
class Detector:
    """A lane detector before it is loaded.

    family, variant, model: what `find_saved` finds it by again. structure: makes the network, with any
    weights. load: makes it with the weights of a checkpoint, or its own. adapter: reads its outputs as
    lanes of a frame. preprocess: how it wants its images. size: (width, height) of the scenes that are
    rendered for it.
    """

    family: str
    variant: str | None
    model: str | dict[str, Any] | None
    structure: Callable[[], nn.Module]
    load: Callable[[Path | None], nn.Module]
    adapter: Callable[[Frame], Adapter]
    preprocess: Preprocess
    size: tuple[int, int]


def find(family: str, variant: str | None = None, model: str | None = None) -> Detector:
    """The detector of a family.

    Args:
        family: one of `FAMILIES`, or an import path `package.module:Adapter` to a subclass of `Adapter`.
        variant: of LSTR, "tusimple" or "culane".
        model: import path of a network, or a config of OpenMMLab; None for LSTR itself, or the small one of
            the family.

    Raises:
        ModelError: if there is no such family, variant or network.
    """
    adapter = _adapter(family, variant)
    if model is not None and openmmlab.is_config(model):
        config = openmmlab.read(model)
        return _described(family, variant, config.description, adapter, config.preprocess)
    if model is not None:
        return _users(family, variant, model, adapter)
    if family == LSTR_FAMILY:
        return _lstr(variant or "tusimple", adapter)
    if family not in _SMALL:
        raise ModelError(
            f"task.family {family!r} comes without a network: set task.model to an import path"
        )
    return _small(family, adapter)


def find_saved(described: Mapping[str, Any], file: Path) -> Detector:
    """The detector that an artifact describes; nothing that the artifact brings is run.

    Args:
        described: `family`, `variant` and `model` of a `Detector`.
        file: where they stand.

    Raises:
        ModelError: if there is no such detector, or it is code that nobody has imported.
    """
    family, variant, model = (described.get(key) for key in ("family", "variant", "model"))
    named = isinstance(variant, str | None) and isinstance(model, str | dict | None)
    if not isinstance(family, str) or not named:
        raise ModelError(f"{file} does not describe a lane detector: family, variant and model are names")
    for path in (family, model):
        if isinstance(path, str) and (":" in path or path.endswith(".py")):
            check_imported(path, file)
    if isinstance(model, dict):
        description = Description.from_json(model, str(file))
        return _described(family, variant, description, _adapter(family, variant), Preprocess())
    return find(family, variant, model)


def _adapter(family: str, variant: str | None) -> Callable[[Frame], Adapter]:
    if family == LSTR_FAMILY:
        kind = import_object("ptq_lane.lstr.adapter:LSTRAdapter", "task.family")
        return partial(kind, variant=find_variant(variant or "tusimple").name)
    if variant is not None:
        raise ModelError(f"task.variant {variant!r} is of the family lstr, not of {family!r}: remove it")
    if family in _SMALL:
        return import_object(f"ptq_lane.families.{_SMALL[family][0]}", "task.family")
    if ":" not in family:
        raise ModelError(f"task.family {family!r} is unknown{nearest(family, FAMILIES)}")
    found = import_object(family, "task.family")
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise ModelError(f"task.family {family!r} is {found!r}: it must be a subclass of ptq_lane.Adapter")
    return found


def _small(family: str, adapter: Callable[[Frame], Adapter]) -> Detector:
    module, _, name = _SMALL[family][1].partition(":")

    def structure() -> nn.Module:
        kind: Callable[[], nn.Module] = getattr(import_module(f"ptq_lane.networks.{module}"), name)
        return kind().eval()

    def load(checkpoint: Path | None) -> nn.Module:
        file = checkpoint or WEIGHTS / f"{family}.safetensors"
        network, state = structure(), read_checkpoint(file)
        _check_family(family, network, state, file)
        put_weights(network, {key: value.float() for key, value in state.items()}, file)
        return network

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    preprocess = Preprocess(size=(HEIGHT, WIDTH), mean=mean, std=std)
    return Detector(family, None, None, structure, load, adapter, preprocess, (WIDTH, HEIGHT))


def _check_family(family: str, network: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Say so where a checkpoint is one of another family."""
    if state.keys() & network.state_dict().keys() != set(network.state_dict()):
        for other in _SMALL:
            if other != family and find(other).structure().state_dict().keys() == state.keys():
                raise ModelError(
                    f"task.checkpoint {str(file)!r} is one of the family {other!r}, not of {family!r}: set "
                    f"task.family to {other}"
                )


def _lstr(variant: str, adapter: Callable[[Frame], Adapter]) -> Detector:
    found = find_variant(variant)

    def load(checkpoint: Path | None) -> nn.Module:
        if checkpoint is None:
            raise ModelError(
                "task.family 'lstr' comes without weights, and none are ever downloaded: set "
                "task.checkpoint to a file of them"
            )
        return load_lstr(variant, read_checkpoint(checkpoint), checkpoint)

    height, width = found.size
    preprocess = Preprocess(size=found.size, bgr=True, mean=MEAN, std=STD)
    structure = partial(_evaluating, partial(LSTR, found.classes))
    return Detector(LSTR_FAMILY, variant, None, structure, load, adapter, preprocess, (width, height))


def _users(family: str, variant: str | None, model: str, adapter: Callable[[Frame], Adapter]) -> Detector:
    structure = partial(_evaluating, partial(import_network, model))

    def load(checkpoint: Path | None) -> nn.Module:
        network = structure()
        if checkpoint is not None:
            put_weights(network, read_checkpoint(checkpoint), checkpoint)
        return network

    return Detector(family, variant, model, structure, load, adapter, Preprocess(), (640, 360))


def _described(
    family: str,
    variant: str | None,
    description: Description,
    adapter: Callable[[Frame], Adapter],
    preprocess: Preprocess,
) -> Detector:
    structure = partial(_evaluating, partial(openmmlab.structure, description))

    def load(checkpoint: Path | None) -> nn.Module:
        return _evaluating(partial(openmmlab.load, description, checkpoint))

    height, width = preprocess.size or (360, 640)
    kept = description.to_json()
    return Detector(family, variant, kept, structure, load, adapter, preprocess, (width, height))


def _evaluating(make: Callable[[], nn.Module]) -> nn.Module:
    """In evaluation mode, no module writing over its input: the same function, plain to follow."""
    network = make()
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return network.eval()


@torch.no_grad()
def check(adapter: Adapter, outputs: Any, images: int) -> None:
    """Make sure that an adapter reads what a network returns.

    Raises:
        ModelError: naming the function of the adapter that does not fit.
    """
    name = type(adapter).__name__
    heads = adapter.heads(outputs)
    wrong = [key for key, head in heads.items() if head.ndim < 2 or len(head) != images]
    if not heads or wrong:
        what = f"{wrong[0]!r} of shape {list(heads[wrong[0]].shape)}" if wrong else "no group"
        raise ModelError(f"heads() of {name} gives {what} for {images} images: give [images, ...] for each")
    adapter.splice(outputs, {key: head + 1 for key, head in heads.items()})
    for key, weight in adapter.confidence(outputs).items():
        if key not in heads:
            raise ModelError(f"confidence() of {name} names {key!r}, heads() has {', '.join(heads)}")
        try:
            weight.expand_as(heads[key])
        except RuntimeError as error:
            raise ModelError(
                f"confidence() of {name} gives {list(weight.shape)} for {key!r}, which does not broadcast "
                f"to {list(heads[key].shape)}"
            ) from error
    decoded = adapter.decode(outputs)
    if not isinstance(decoded, list) or len(decoded) != images:
        found = f"{len(decoded)} entries" if isinstance(decoded, list) else type(decoded).__name__
        raise ModelError(
            f"decode() of {name} gives {found} for {images} images: give a list of one Lanes each"
        )
    if decoded[0].rows.tolist() != adapter.frame.rows.tolist():
        raise ModelError(f"decode() of {name} gives lanes at other rows than self.frame.rows: use those")
