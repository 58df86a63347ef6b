"""Readers of files from strangers, as targets of tools/fuzz.py: a valid input each, and what reads it."""

from importlib import import_module

from fuzz_targets.target import Target

ROOMS = ("core", "vision", "lane", "llm", "diffusion")


def all_targets() -> dict[str, Target]:
    """Every target by its name."""
    return {
        target.name: target for room in ROOMS for target in import_module(f"fuzz_targets.{room}").TARGETS
    }


def find_target(name: str) -> Target:
    """The target of that name; rooms behind its own are not imported.

    Raises:
        StopIteration: if there is none.
    """
    targets = (target for room in ROOMS for target in import_module(f"fuzz_targets.{room}").TARGETS)
    return next(target for target in targets if target.name == name)
