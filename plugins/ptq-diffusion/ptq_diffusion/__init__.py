"""ptq-diffusion: post-training quantization of diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptq_diffusion.registration import register
from ptqcore import Plugin

if TYPE_CHECKING:
    from ptq_diffusion.hub import load_pipeline as load_pipeline
    from ptq_diffusion.rescheduling import add_timesteps as add_timesteps
    from ptq_diffusion.rescheduling import set_schedule as set_schedule

_HOME = {"add_timesteps": "rescheduling", "load_pipeline": "hub", "set_schedule": "rescheduling"}

__all__ = [*_HOME, "plugin"]

plugin = Plugin(
    name="diffusion",
    tasks={"denoising": "ptq_diffusion.denoising:Denoising"},
    steps={
        "tiar": "ptq_diffusion.tiar:TIAR",
        "finite-set-calibration": "ptq_diffusion.finite_set:FiniteSetCalibration",
    },
    exporters={"diffusers": "ptq_diffusion.diffusers_export:DiffusersExport"},
    recipes="ptq_diffusion/recipes",
    default_recipe="w4a8",
    commands="ptq_diffusion.commands:app",
)

register()


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'ptq_diffusion' has no attribute {name!r}")
    return getattr(import_module(f"ptq_diffusion.{_HOME[name]}"), name)
