"""The ablation: TIAR on and off × finite set calibration on and off, each variant run for every seed.

OUTPUT/ablation.md, ablation.csv, ablation.html     the table, written again after every run
OUTPUT/runs/PIPELINE-VARIANT-SEED-DIGEST/           the artifact and the report of each run

The digest is of everything that decides a figure: the recipe, the files of the pipeline and of its
prompts, and the versions of the packages that compute.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from ptq_diffusion import pipelines
from ptq_diffusion.ablation_table import Row, Switch, Variant, write_tables
from ptq_diffusion.denoising import DenoisingOptions
from ptqcore import (
    DataError,
    Recipe,
    RecipeError,
    digest_files,
    digest_of,
    find_recipe,
    quantize,
    read_json,
    say,
)

PLUGIN = "diffusion"
BASE = "w4a8"
_PACKAGES = ("ptqcore", "ptq-diffusion", "torch", "diffusers")
_OWN_KEYS = {
    "seed": "--seeds",
    "steps": "--rest, --scope and --cache",
    "task.pipeline": "--pipeline",
    "task.layers": "--layers",
    "task.steps": "--steps",
    "task.samples": "--samples",
    "task.seeds": "--seeds",
    "quant.weights.bits": "--weights",
    "quant.activations.bits": "--activations",
}
_FIRST_IMAGE: int = DenoisingOptions.model_fields["seeds"].default


@dataclass(frozen=True)
class Ablation:
    """What is compared, on the grids of the recipe `w4a8`.

    pipelines: as `task.pipeline`. weights, activations: bits; every pair of them. seeds: one run of every
    variant for each, with calibration data and judged images of its own. samples: judged images.
    steps: inference steps. layers: as `task.layers`. scope: of finite set calibration. cache: whether
    there are variants with tables too. rest: the step that quantizes what TIAR does not.
    overrides: further keys of the recipe, `KEY=VALUE` each.
    """

    pipelines: Sequence[str]
    weights: Sequence[int]
    activations: Sequence[int]
    seeds: Sequence[int]
    samples: int
    steps: int
    layers: str
    scope: str
    cache: bool
    rest: str
    overrides: Sequence[str]
    output: Path


@dataclass(frozen=True)
class Run:
    """One variant with one seed. folder: of its artifact."""

    variant: Variant
    seed: int
    recipe: Recipe
    folder: Path

    def read(self) -> dict[str, float] | None:
        """The metrics of a finished run; None as long as there are none."""
        if not (self.folder / "manifest.json").is_file():
            return None
        try:
            found: dict[str, float] = read_json(self.folder / "metrics.json")["after"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found


def run(ablation: Ablation, resume: bool) -> list[Row]:
    """Carry out what is not known yet, and write the tables.

    Args:
        ablation: what is compared.
        resume: whether to keep what an earlier ablation in the same folder found, if nothing that decides
            it has changed, and to go on with an interrupted run.

    Raises:
        PtqError: if a value is wrong or a run fails; finished runs stay.
    """
    runs = make_runs(ablation)
    done = {index: found for index, each in enumerate(runs) if resume and (found := each.read())}
    if done:
        say(f"ablation: {len(done)} of {len(runs)} runs are finished already")
    for index, each in enumerate(runs):
        if index not in done:
            say(f"ablation: run {index + 1} of {len(runs)}, {each.variant}, seed {each.seed}")
            done[index] = quantize(each.recipe, PLUGIN, each.folder, resume).after
            write_tables(_rows(runs, done), _notes(ablation, runs[0].recipe), ablation.output)
    rows = _rows(runs, done)
    write_tables(rows, _notes(ablation, runs[0].recipe), ablation.output)
    return rows


def make_runs(ablation: Ablation) -> list[Run]:
    """A run for each variant and seed, those of a variant side by side.

    Raises:
        PtqError: if a value is wrong, or a file cannot be read.
    """
    _check(ablation)
    names = _short(ablation.pipelines)
    tiar: tuple[Switch, ...] = ("off", "on", "cache") if ablation.cache else ("off", "on")
    runs = []
    for pipeline in ablation.pipelines:
        files = _digest_folder(pipeline)
        for bits, one, fsc in product(product(ablation.weights, ablation.activations), tiar, (False, True)):
            variant = Variant(names[pipeline], *bits, one, fsc)
            runs += [_run(ablation, variant, pipeline, files, seed) for seed in ablation.seeds]
    return runs


def _check(ablation: Ablation) -> None:
    """Raises:
    RecipeError: if an option has no value or one twice, or a key is set that has an option.
    """
    for option in ("pipelines", "weights", "activations", "seeds"):
        values = getattr(ablation, option)
        name = "--pipeline" if option == "pipelines" else f"--{option}"
        if not values or len(set(values)) < len(values):
            raise RecipeError(f"{name} is {list(values)}: give at least one value, and none twice")
    for override in ablation.overrides:
        key = override.partition("=")[0]
        if key in _OWN_KEYS:
            raise RecipeError(f"--set {key}: the ablation sets it itself, use {_OWN_KEYS[key]}")


def _short(sources: Sequence[str]) -> dict[str, str]:
    """Path → its last part; the whole path where another ends in the same."""
    names = {source: Path(source).name or source for source in sources}
    ends = list(names.values())
    return {source: name if ends.count(name) == 1 else source for source, name in names.items()}


def _run(ablation: Ablation, variant: Variant, pipeline: str, files: str, seed: int) -> Run:
    recipe = find_recipe(BASE, PLUGIN, _settings(ablation, variant, pipeline, seed))
    sections = recipe.model_dump(mode="json")
    read = [sections["task"].pop(key) for key in ("prompts", "negative_prompts")]
    del sections["task"]["pipeline"]
    used = {name: version(name) for name in _PACKAGES}
    mark = digest_of([sections, files, *(_digest_text(path) for path in read), used])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{variant.pipeline}-{recipe.name}-seed{seed}-{mark[:8]}")
    return Run(variant, seed, recipe, ablation.output / "runs" / name)


def _settings(ablation: Ablation, variant: Variant, pipeline: str, seed: int) -> list[str]:
    """Keys of the recipe; those that a user gave come last, but for none that is an option."""
    steps: list[Any] = [{"finite-set-calibration": {"scope": ablation.scope}}] if variant.fsc else []
    if variant.tiar != "off":
        steps.append({"tiar": {"mode": "cache" if variant.tiar == "cache" else "reconstruct"}})
    settings = {
        "name": variant.name,
        "seed": seed,
        "steps": [*steps, ablation.rest],
        "export": [],
        "task.pipeline": pipeline,
        "task.layers": ablation.layers,
        "task.steps": ablation.steps,
        "task.samples": ablation.samples,
        "task.seeds": _FIRST_IMAGE + seed * ablation.samples,
        "quant.weights.bits": variant.weights,
        "quant.activations.bits": variant.activations,
    }
    if ablation.layers == "temporal":
        settings["quant.first_last_bits"] = None
    return [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *ablation.overrides]


def _digest_folder(pipeline: str) -> str:
    folder = pipelines.locate(pipeline)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        return digest_of([[str(path.relative_to(folder)) for path in files], digest_files(files)])
    except OSError as error:
        raise DataError(f"--pipeline {pipeline!r} cannot be read: {error}") from error


def _digest_text(path: str | None) -> str | None:
    try:
        return None if path is None else digest_files([Path(path).expanduser()])
    except OSError as error:
        raise DataError(f"the prompts {path!r} cannot be read: {error.strerror}") from error


def _rows(runs: Sequence[Run], done: dict[int, dict[str, float]]) -> list[Row]:
    """A row for each variant of which a run is known."""
    found: dict[Variant, list[dict[str, float]]] = {}
    for index in sorted(done):
        found.setdefault(runs[index].variant, []).append(done[index])
    return [Row(variant, metrics) for variant, metrics in found.items()]


def _notes(ablation: Ablation, recipe: Recipe) -> list[str]:
    """What the rows and columns of the table mean."""
    observer = recipe.quant.activations.observer.name if recipe.quant.activations else "none"
    return [
        "The temporal block alone is quantized, the rest stays in full precision."
        if ablation.layers == "temporal"
        else "The whole denoiser is quantized.",
        f"{ablation.samples} images in {ablation.steps} steps, against full precision with the same noise.",
        f"Means ± standard deviations of the sample over the seeds {', '.join(map(str, ablation.seeds))}; "
        "each has calibration data and images of its own, the same in all rows.",
        f"TIAR off: the weights of the temporal block by the step `{ablation.rest}`, as all others; cache: "
        "tables in its place.",
        "FSC on: a range for each timestep for the inputs of "
        f"{'the temporal block' if ablation.scope == 'temporal' else 'all layers'}; off: one range for all "
        f"timesteps, by the observer `{observer}`.",
        "The temporal block sees no image: where its ranges are those of the smallest and largest value, "
        "seeds differ in the images that are judged, not in how it is quantized.",
        "Ranges of a small denoiser move little over time: beside one range from smallest to largest "
        "value, what FSC gains shows at 6 bits and below, and in temporal errors. A moving average clips "
        "what is large at few timesteps, and FSC brings that back at 8 bits too. Images and trajectories "
        "hang on few rounding errors there, and can get worse where temporal errors get better.",
    ]
