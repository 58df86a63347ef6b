"""ptq-lane: post-training quantization of lane detectors, judged by the lanes that they find."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptqcore import Plugin

# Read when OpenCV is imported: a picture of a few bytes may else claim 3 GB.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))

if TYPE_CHECKING:
    from ptq_lane.adapter import Adapter as Adapter
    from ptq_lane.deployed import LaneDetector as LaneDetector
    from ptq_lane.deployed import load as load
    from ptq_lane.lanes import Frame as Frame
    from ptq_lane.lanes import Lanes as Lanes

_HOME = {
    "Adapter": "adapter",
    "Frame": "lanes",
    "LaneDetector": "deployed",
    "Lanes": "lanes",
    "load": "deployed",
}

__all__ = [*_HOME, "plugin"]

plugin = Plugin(
    name="lane",
    tasks={"lanes": "ptq_lane.lane_task:LaneTask"},
    steps={
        "focus-ranges": "ptq_lane.focus_ranges:FocusRanges",
        "selective-focus": "ptq_lane.selective_focus:SelectiveFocus",
    },
    recipes="ptq_lane/recipes",
    default_recipe="w4a4",
    commands="ptq_lane.commands:app",
)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'ptq_lane' has no attribute {name!r}")
    return getattr(import_module(f"ptq_lane.{_HOME[name]}"), name)
