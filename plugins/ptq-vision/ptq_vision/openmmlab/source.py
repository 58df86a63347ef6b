"""Segmentors of mmseg as sources of models, so that the task `segmentation` takes them."""

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ptq_vision.openmmlab import checkpoints, description, loading
from ptq_vision.openmmlab.description import Description
from ptq_vision.openmmlab.preprocessing import Preprocessing
from ptq_vision.openmmlab.wrap import Network
from ptq_vision.preprocess import Preprocess
from ptq_vision.source import Source
from ptqcore import ModelError, read_bytes

FILE = "openmmlab.json"


def handles(model: str) -> bool:
    """Whether `find` is the one to ask: for a config, or the description that an artifact holds."""
    return loading.is_config(model) or Path(model).name == FILE


def find(model: str) -> Source:
    """The source of a segmentor; without a checkpoint its weights are random, the same every time.

    Args:
        model: a config file, `mmseg:NAME` for one that mmseg ships, or the file `FILE` of an artifact.

    Raises:
        ModelError: if it cannot be read, or defines a detector.
    """
    if loading.is_config(model):
        return _source(loading.read(model), model)
    try:
        text = read_bytes(Path(model)).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} cannot be read: {description.line(error)}") from error
    return _source(description.parse(text), model)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a checkpoint as those of a `Network`."""
    return {f"model.{name}": tensor for name, tensor in checkpoints.for_inference(state).items()}


def _source(of: Description, model: str) -> Source:
    if loading.kind(of) != "segmentation":
        raise ModelError(f"task.model {model!r} is a detector: use the task detection")
    how = Preprocessing.of(of)
    return Source(
        name=FILE,
        structure=partial(_network, of),
        preprocess=Preprocess(
            size=_fixed_size(of, how),
            interpolation="bilinear",
            order="rgb" if how.rgb else "bgr",
            scale=1.0,
            mean=how.mean,
            std=how.std,
        ),
        rename=renamed,
        brings_weights=True,
        files={FILE: description.describe(of)},
    )


def _fixed_size(of: Description, how: Preprocessing) -> tuple[int, int] | None:
    """One size for all pictures. A scale such as 2048 x 512 that keeps proportions only bounds the sides,
    and would distort if taken literally: the size of the crops in training is taken then.
    """
    crop = (of.model.get("data_preprocessor") or {}).get("size")
    bound_only = how.keep_ratio and how.size is not None and how.size[1] > 2 * how.size[0]
    return (int(crop[0]), int(crop[1])) if crop and bound_only else how.size


def _network(of: Description, classes: int | None) -> nn.Module:
    """Its number of classes is part of the description."""
    return Network(loading.build(of))
