"""Zero-shot tasks of lm-eval (the extra `eval`), from task files and data files of this machine alone."""

import logging
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ptq_llm.models import LanguageModel
from ptqcore import DataError, digest_files, digest_of, one_line, read_bytes

_BUILDERS = ("arrow", "csv", "json", "parquet", "text")


_MOST_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """Reads YAML and passes over tags such as `!function`, which lm-eval resolves itself."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: None)


def task_files(path: str) -> list[Path]:
    """The files that a task consists of: its YAML file, those that it includes, and its data.

    The YAML file is written as lm-eval documents it; its data must be named by `dataset_path: json` (or
    arrow, csv, parquet, text) and `dataset_kwargs: {data_files: …}`, relative to the current folder.

    Raises:
        DataError: if lm-eval is not installed, a file is missing, or the data would have to be downloaded.
    """
    if find_spec("lm_eval") is None:
        raise DataError("--tasks needs lm-eval, which is not installed: pip install 'ptq-llm[eval]'")
    config, files = _read(Path(path).expanduser())
    if not isinstance(config.get("task"), str):
        raise DataError(f"--tasks {path!r} has no key task that names it: give the YAML file of one task")
    dataset, options = config.get("dataset_path"), config.get("dataset_kwargs")
    if dataset not in _BUILDERS or not isinstance(options, dict) or "data_files" not in options:
        raise DataError(
            f"--tasks {path!r} takes its data from {dataset!r}, and nothing is downloaded: name local "
            "files with dataset_path: json and dataset_kwargs: {data_files: FILE}"
        )
    for data in _flat(options["data_files"]):
        if not Path(data).is_file():
            raise DataError(f"--tasks {path!r}: its data file {data!r} does not exist")
        files.append(Path(data))
    return files


def _read(path: Path, includers: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """A task's configuration with what it includes, and the files that it was read from."""
    if path.resolve() in includers:
        raise DataError(f"--tasks {str(path)!r} includes itself: remove its key include")
    try:
        config = yaml.load(read_bytes(path, _MOST_BYTES).decode("utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"--tasks {str(path)!r} cannot be read: {reason}") from None
    if not isinstance(config, dict):
        raise DataError(f"--tasks {str(path)!r} must be a mapping of keys, not {type(config).__name__}")
    included: dict[str, Any] = {}
    files = [path]
    for name in _flat(config.pop("include", [])):
        found, more = _read(path.parent / name, (*includers, path.resolve()))
        included |= found
        files += more
    return included | config, files


def _flat(names: Any) -> list[str]:
    """The names in a name, a list of them, or a mapping to them."""
    if isinstance(names, dict):
        return [name for value in names.values() for name in _flat(value)]
    return [name for value in names for name in _flat(value)] if isinstance(names, list) else [str(names)]


def identity(path: str) -> str:
    """A digest of everything that decides what a task asks: its files, and the version of lm-eval.

    Raises:
        DataError: see `task_files`.
    """
    return digest_of([digest_files(task_files(path)), version("lm_eval")])


def evaluate(judged: LanguageModel, task: str, cache: Path) -> dict[str, float]:
    """The metrics of one task, by name: `acc`, `acc_norm`, ….

    Requests are run one at a time, so that no model sees padding.

    Args:
        judged: a model, quantized or not, and its tokenizer.
        task: the YAML file; see `task_files`.
        cache: a folder for the data as `datasets` keeps it.

    Raises:
        DataError: if lm-eval cannot run the task.
    """
    task_files(task)
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache / "datasets"))
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(task).expanduser().resolve()
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=judged.model, tokenizer=judged.tokenizer, batch_size=1),
            tasks=[str(path)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"--tasks {task!r} cannot be run by lm-eval: {line[:300]}") from error
    (results,) = found["results"].values()
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if "," in name and "_stderr" not in name
    }
