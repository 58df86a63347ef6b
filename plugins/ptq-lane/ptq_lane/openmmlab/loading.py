"""Networks from OpenMMLab configs, and from the descriptions that artifacts keep.

A config `.py` is a program of the user, and reading it runs it. The description made of it is data, from
which the same structure is built of classes that the libraries, or code imported before, have registered.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq_lane.openmmlab import stand_in
from ptq_lane.openmmlab.description import SCOPES, Description, for_inference, types
from ptq_lane.openmmlab.network import Network
from ptq_lane.preprocess import Preprocess
from ptqcore import ModelError, nearest, one_line, put_weights, quietly, read_checkpoint, training_history

INSTALL = (
    "pip install --no-deps mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 mmsegmentation==1.2.2 && "
    "pip install addict yapf termcolor matplotlib prettytable pycocotools shapely six terminaltables tqdm "
    "ftfy regex"
)
_SHIPPED = re.compile(rf"({'|'.join(SCOPES)}):(.+)")
_AUXILIARY = "auxiliary_head."


@dataclass(frozen=True)
class Config:
    """What a config says: the network, and how it wants its images."""

    description: Description
    preprocess: Preprocess


def is_config(model: str) -> bool:
    """Whether `task.model` names an OpenMMLab config: a `.py` file, `mmseg:NAME` or `mmdet:NAME`."""
    return model.endswith(".py") or _SHIPPED.fullmatch(model) is not None


def read(source: str) -> Config:
    """What a config defines; reading it runs it.

    Args:
        source: a `.py` file, or `mmseg:NAME` or `mmdet:NAME` for one that the library ships.

    Raises:
        ModelError: if a package is missing, or the config cannot be read.
    """
    shipped = _SHIPPED.fullmatch(source)
    require("mmengine", "mmcv", *([shipped[1]] if shipped else []))
    path = _shipped(shipped[1], shipped[2]) if shipped else Path(source).expanduser()
    if not path.is_file():
        raise ModelError(f"task.model {source!r} is no file: give a config, mmseg:NAME or mmdet:NAME")
    from mmengine.config import Config as Program

    try:
        config = Program.fromfile(str(path)).to_dict()
        model = config["model"]
        scope = shipped[1] if shipped else config.get("default_scope", str(model["type"]).split(".")[0])
        given = config.get("data_preprocessor") or model.get("data_preprocessor") or {}
        found = Config(Description(scope, for_inference(model)), _preprocess(config, given))
    except (Exception, SystemExit) as error:
        raise ModelError(f"task.model {source!r}: the config cannot be read: {one_line(error)}") from error
    if scope not in SCOPES:
        raise ModelError(
            f"task.model {source!r}: its default_scope is {scope!r}, not {' or '.join(SCOPES)}"
        )
    return found


def structure(description: Description) -> nn.Module:
    """The network of a description, in evaluation mode, with any weights.

    Raises:
        ModelError: if a package is missing, a class is not registered, or the library cannot build it.
    """
    require("mmengine", "mmcv", description.scope)
    with _quiet():
        stand_in.install()
        import_module(f"{description.scope}.models")
        _check_types(description)
        try:
            model = _construct(description)
        except Exception as error:
            raise ModelError(f"{description.scope} cannot build the network: {one_line(error)}") from error
    return Network(model).eval()


def load(description: Description, checkpoint: Path | None) -> nn.Module:
    """The network of a description with the weights of a checkpoint of mmengine, of which nothing is run.

    Raises:
        ModelError: as of `structure`, and if there is no checkpoint, or it is of another network.
    """
    if checkpoint is None:
        raise ModelError("a config of OpenMMLab has no weights, set task.checkpoint to a file of them")
    network = structure(description)
    state = read_checkpoint(checkpoint, harmless=training_history())
    put_weights(network, _renamed(state), checkpoint)
    return network


def require(*packages: str) -> None:
    """Raise a ModelError that says what to install, if a package is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ModelError(f"configs of OpenMMLab need {', '.join(missing)}, not installed here: {INSTALL}")


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of inference under the names of a `Network`."""
    return {f"model.{key}": value for key, value in state.items() if not key.startswith(_AUXILIARY)}


def _shipped(scope: str, name: str) -> Path:
    """The config of that stem inside a library's wheel."""
    package = find_spec(scope)
    folders = [Path(folder) for folder in (package and package.submodule_search_locations) or []]
    files = {path.stem: path for folder in folders for path in folder.glob(".mim/configs/[!_]*/*.py")}
    if name not in files:
        raise ModelError(f"task.model '{scope}:{name}': {scope} ships no such config{nearest(name, files)}")
    return files[name]


def _preprocess(config: Mapping[str, Any], given: Mapping[str, Any]) -> Preprocess:
    """How the network wants its images; a size that keeps proportions is none, since it only bounds."""
    pipeline: list[dict[str, Any]] = config.get("test_pipeline") or []
    resize = next((step for step in pipeline if str(step.get("type")).endswith("Resize")), {})
    scale = None if resize.get("keep_ratio") else resize.get("scale")
    return Preprocess(
        size=None if scale is None else (int(scale[1]), int(scale[0])),
        bgr=not given.get("bgr_to_rgb", False),
        mean=_three(given.get("mean") or (0.0,)),
        std=_three(given.get("std") or (1.0,)),
    )


def _three(values: Any) -> tuple[float, float, float]:
    """Of pixels of 0 to 255 for each channel, as those of 0 to 1."""
    first, second, third = (float(value) / 255 for value in (list(values) * 3)[:3])
    return first, second, third


def _check_types(description: Description) -> None:
    """Allow only classes that are registered: of any other name, registries import a module."""
    from mmengine.registry import MODELS, TASK_UTILS, WEIGHT_INITIALIZERS

    roots = (MODELS, TASK_UTILS, WEIGHT_INITIALIZERS)
    registries = [one for root in roots for one in (root, *root.children.values())]
    known = {name for registry in registries for name in registry.module_dict}
    for name in sorted(types(description.model)):
        prefix, _, short = name.rpartition(".")
        if short not in known or prefix not in ("", *SCOPES):
            raise ModelError(
                f"the network is made of {name!r:.60}, which is not registered: import the package that "
                "registers it (in a config: custom_imports) first"
            )


def _construct(description: Description) -> nn.Module:
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(description.scope):
        model: nn.Module = MODELS.build(ConfigDict(description.model))
    for module in model.modules():
        if type(module).__module__ == "mmcv.cnn.bricks.wrappers":
            # Convolutions and linear layers for torch below 1.5, the same as torch's own since then.
            module.__class__ = type(module).__bases__[0]
    return model


def _quiet() -> AbstractContextManager[None]:
    """Keep the libraries' warnings and logs from the user."""
    from mmengine.logging import MMLogger

    return quietly(MMLogger.get_current_instance())
