"""Models of the library timm, an optional dependency."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from ptq_vision import torchvision_operators
from ptq_vision.preprocess import Preprocess
from ptq_vision.source import Source
from ptqcore import ModelError

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def bare_name(model: str, own: Iterable[str]) -> Source:
    """A model of timm named without `timm:`.

    Raises:
        ModelError: if it is unknown, with what was probably meant.
    """
    close = get_close_matches(model, list(own), n=1, cutoff=0.6)
    known = f"known are {', '.join(own)}, timm:NAME, and package.module:attribute"
    hint = f"did you mean {close[0]!r}?" if close else known
    try:
        is_known = _timm().is_model(model)
    except ModelError as error:
        raise ModelError(
            f"task.model {model!r} is unknown: {hint} (timm was not asked: {error})"
        ) from error
    if not is_known:
        raise ModelError(f"task.model {model!r} is unknown, to timm as well: {hint}")
    return source(model)


def source(name: str) -> Source:
    """The source of a model of timm.

    Raises:
        ModelError: if timm cannot be imported, or does not know the name.
    """
    try:
        timm = _timm()
    except ModelError as error:
        raise ModelError(f"task.model 'timm:{name}': {error}") from error
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=1, cutoff=0.6)
        hint = f"; did you mean 'timm:{close[0]}'?" if close else "; timm.list_models() lists what it has"
        raise ModelError(f"task.model 'timm:{name}' is unknown to timm {timm.__version__}{hint}")
    config = timm.models.get_pretrained_cfg(name)

    def structure(classes: int | None) -> nn.Module:
        return timm.create_model(name, **({} if classes is None else {"num_classes": classes}))

    classifier = getattr(config, "classifier", None)
    return Source(
        name=f"timm:{name}",
        structure=structure,
        preprocess=Preprocess() if config is None else _preprocess(config),
        scores=f"{classifier}.weight" if isinstance(classifier, str) else None,
    )


def _preprocess(config: Any) -> Preprocess:
    _, height, width = config.input_size
    known = config.interpolation in _INTERPOLATIONS
    return Preprocess(
        size=height if height == width else (height, width),
        crop=config.crop_pct,
        interpolation=config.interpolation if known else "bicubic",
        mean=config.mean,
        std=config.std,
    )


def _timm() -> ModuleType:
    if find_spec("timm") is None:
        raise ModelError("timm is not installed: pip install timm")
    try:
        torchvision_operators.make_importable()
        return import_module("timm")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"timm cannot be imported, it needs a torchvision made for the installed torch: {reason}"
        ) from error
