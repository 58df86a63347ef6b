"""Where the models that come with the plugin lie: folders in diffusers' layout, each with a `card.md`."""

from importlib.resources import files
from pathlib import Path

from ptqcore import ModelError

DEFAULT = "mnist-unet"
CLASSIFIER = "mnist-classifier"


def names() -> list[str]:
    """Names of the embedded denoisers, sorted; each takes images [n, 1, 16, 16] in [-1, 1]."""
    return sorted(place.name for place in folder().iterdir() if (place / "scheduler").is_dir())


def path(name: str) -> Path:
    """Folder of an embedded denoiser, or of the classifier (`CLASSIFIER`).

    Raises:
        ModelError: no such model is embedded.
    """
    if name not in (*names(), CLASSIFIER):
        raise ModelError(f"{name!r} is not an embedded model; known: {', '.join((*names(), CLASSIFIER))}")
    return folder() / name


def folder() -> Path:
    """Where the embedded models lie, one folder each."""
    return Path(str(files("ptq_diffusion"))) / "embedded"
