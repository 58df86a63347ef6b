"""Run our recipe on one evaluated picture: the bench measures accuracy itself, in the engines."""

from request import answer, read_request

from ptqcore import quantize
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe

_EXPORT = "onnx-qdq"
# What comes before calibration and after rounding; the peers are given an exported model and samples.
_AROUND = {
    *("load the model", "calibration samples", "metrics before"),
    *("metrics after", "save and load back", "export and read back"),
}


def main() -> None:
    """The file is that of the run's export; memory is that of the whole run."""
    folder, request = read_request()
    registry = discover()
    overrides = [*request["overrides"], f"export=[{_EXPORT}]", "task.max_images=1"]
    recipe = read_recipe(registry.recipe_file(request["recipe"], request["plugin"]), overrides)
    record = quantize(recipe, request["plugin"], folder / "run", registry=registry)
    around = sum(seconds for phase, seconds in record.phases.items() if phase in _AROUND)
    (file,) = (folder / "run" / "exports" / _EXPORT).glob("*.onnx")
    answer(folder, str(file.relative_to(folder)), record.seconds - around, record.peak_memory_bytes)


if __name__ == "__main__":
    main()
