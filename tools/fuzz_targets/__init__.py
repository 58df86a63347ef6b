"""Readers of files from strangers, as targets of tools/fuzz.py: a valid input each, and what reads it."""

from importlib import import_module

from fuzz_targets.target import Target

ROOMS = ("core", "vision", "lane", "llm", "diffusion")


def all_targets() -> dict[str, Target]:
    """Every target by its name."""
    return {
        target.name: target for room in ROOMS for target in import_module(f"fuzz_targets.{room}").TARGETS
    }
