"""Run our recipe on one evaluated window: the bench judges all exports itself, alike."""

from request import answer, read_request

from ptqcore import quantize
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe

_EXPORT = "compressed-tensors"
_OWN = ("trace", "prepare", "capture", "quantize blocks")


def main() -> None:
    """Seconds are those of finding blocks and quantizing them, memory that of the whole run."""
    folder, request = read_request()
    registry = discover()
    overrides = [*request["overrides"], f"export=[{_EXPORT}]", "task.max_windows=1"]
    recipe = read_recipe(registry.recipe_file(request["recipe"], "llm"), overrides)
    record = quantize(recipe, "llm", folder / "run", registry=registry)
    seconds = sum(record.phases[phase] for phase in _OWN)
    answer(folder, f"run/exports/{_EXPORT}", seconds, record.peak_memory_bytes)


if __name__ == "__main__":
    main()
