"""mmseg and mmdet models: from a config and a checkpoint, and from the description that an artifact keeps.

A config `.py` is a program of the user, and reading it runs it. The description made of it is data,
from which the same structure is built without running anything of it.
"""

import re
from contextlib import AbstractContextManager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ptq_vision.openmmlab import checkpoints, stand_in
from ptq_vision.openmmlab.description import SCOPES, Description, check_types, for_inference, line
from ptqcore import ModelError, put_weights, quietly

INSTALL = (
    "pip install 'numpy<2.5' opencv-python-headless; "
    "pip install --no-deps mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 mmsegmentation==1.2.2; "
    "pip install addict yapf pyyaml termcolor rich matplotlib packaging prettytable pycocotools scipy "
    "shapely six terminaltables tqdm ftfy regex"
)
_SHIPPED = re.compile(r"(mmseg|mmdet):(.+)")


def is_config(model: str) -> bool:
    """Whether `task.model` names an OpenMMLab config: a `.py` file, `mmseg:NAME` or `mmdet:NAME`."""
    return model.endswith(".py") or _SHIPPED.fullmatch(model) is not None


def kind(model: Description | nn.Module) -> Literal["segmentation", "detection"]:
    """What a described or a built model does.

    Raises:
        ModelError: if it is neither a segmentor nor a detector.
    """
    if isinstance(model, Description):
        return "segmentation" if model.scope == "mmseg" else "detection"
    if hasattr(model, "decode_head"):
        return "segmentation"
    if hasattr(model, "bbox_head"):
        return "detection"
    raise ModelError(
        f"a {type(model).__name__} is neither a segmentor of mmseg nor a one-stage detector of mmdet"
    )


def load(model: str | Description, checkpoint: str | None = None, seed: int = 0) -> nn.Module:
    """The model of a config in evaluation mode, with the weights of a checkpoint or random ones.

    Args:
        model: a config file, `mmseg:NAME` or `mmdet:NAME` for one that the library ships, or what `read`
            made of them.
        checkpoint: a `.pth` file; None for the random weights that training would start from, the
            same for the same seed.
        seed: of the random weights.

    Raises:
        ModelError: if a package is missing, the config cannot be read or built, or the checkpoint
            does not fit it.
    """
    built = build(read(model) if isinstance(model, str) else model, seed)
    if checkpoint is not None:
        put_weights(built, checkpoints.read(checkpoint), Path(checkpoint))
    return built


def read(source: str) -> Description:
    """The description of the model that a config defines; reading a config file runs it.

    Raises:
        ModelError: if the config does not exist or cannot be read.
    """
    shipped = _SHIPPED.fullmatch(source)
    require("mmengine", "mmcv", *([shipped[1]] if shipped else []))
    path = _shipped(shipped[1], shipped[2]) if shipped else Path(source).expanduser()
    if not path.is_file():
        raise ModelError(
            f"task.model {source!r} does not exist: give a config file, mmseg:NAME or mmdet:NAME"
        )
    from mmengine.config import Config

    try:
        with _quiet():
            config = Config.fromfile(str(path)).to_dict()
    except Exception as error:
        raise ModelError(f"task.model {source!r}: the config cannot be read: {line(error)}") from error
    if not isinstance(config.get("model"), dict):
        raise ModelError(f"task.model {source!r}: the config has no section 'model'")
    model = {"data_preprocessor": config.get("data_preprocessor"), **config["model"]}
    scope = shipped[1] if shipped else _scope(source, config)
    return Description(scope, for_inference(model), _resizing(config))


def build(description: Description, seed: int = 0) -> nn.Module:
    """The structure of a described model, with random weights, in evaluation mode.

    Raises:
        ModelError: if a package is missing, or the library cannot build it.
    """
    require("mmengine", "mmcv", description.scope)
    check_types(description.model)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stand_in.install()
        try:
            model = _construct(description)
        except Exception as error:
            raise ModelError(f"{description.scope} cannot build the model: {line(error)}") from error
    return model.eval()


def require(*packages: str) -> None:
    """Raise a ModelError that says what to install, if a package is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModelError(f"OpenMMLab models need {', '.join(missing)}, not installed here: {INSTALL}")


def _shipped(scope: str, name: str) -> Path:
    """The config of that stem inside a library's wheel."""
    package = find_spec(scope)
    assert package is not None
    folders = [Path(folder) / ".mim" / "configs" for folder in package.submodule_search_locations or []]
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("[!_]*/*.py"))}
    if name not in files:
        close = get_close_matches(name, files, n=1, cutoff=0.5)
        hint = f"; did you mean '{scope}:{close[0]}'?" if close else ""
        raise ModelError(f"task.model '{scope}:{name}': {scope} ships no such config{hint}")
    return files[name]


def _scope(source: str, config: dict[str, Any]) -> str:
    """The library of a config: what it says itself, or whichever knows the model's type."""
    stated = config.get("default_scope")
    if stated in SCOPES:
        return stated
    name = str(config["model"].get("type"))
    if name.split(".")[0] in SCOPES:
        return name.split(".")[0]
    for scope in filter(find_spec, SCOPES):
        with _quiet():
            stand_in.install()
            import_module(f"{scope}.models")
        if name in import_module(f"{scope}.registry").MODELS.module_dict:
            return scope
    raise ModelError(f"task.model {source!r}: its type {name!r} is known to neither mmseg nor mmdet")


def _resizing(config: dict[str, Any]) -> list[dict[str, Any]]:
    pipeline = config.get("test_pipeline")
    if pipeline is None:
        pipeline = config.get("test_dataloader", {}).get("dataset", {}).get("pipeline", [])
    steps = [for_inference(step) for step in pipeline]
    return [step for step in steps if step.get("type") in ("Resize", "Pad")]


def _construct(description: Description) -> nn.Module:
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    import_module(f"{description.scope}.models")
    with DefaultScope.overwrite_default_scope(description.scope):
        model = MODELS.build(ConfigDict(description.model))
        model.init_weights()
    for module in model.modules():
        if type(module).__module__ == "mmcv.cnn.bricks.wrappers":
            # Convolutions and linear layers for torch below 1.5, the same as torch's own since then.
            module.__class__ = type(module).__bases__[0]
    return model


def _quiet() -> AbstractContextManager[None]:
    """Keep the libraries' warnings and logs from the user."""
    from mmengine.logging import MMLogger

    return quietly(MMLogger.get_current_instance())
